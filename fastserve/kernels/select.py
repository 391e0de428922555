"""Choose the kernels once, at load, and say which and why not the others."""

from __future__ import annotations

import importlib.util

from fastserve.core.errors import ConfigError
from fastserve.kernels.interface import Kernels, KernelSpec
from fastserve.kernels.reference import ReferenceKernels

# Best first; "module:Class". A backend appears here when its module exists.
_BACKENDS = {
    "triton": "fastserve.kernels.triton",
    "cpu": "fastserve.kernels.cpu",
}


def select(name: str, spec: KernelSpec) -> tuple[Kernels, list[str]]:
    """Return the kernels named `name` ("auto" takes the best that can serve `spec`) and one line per decision.

    Raises:
        ConfigError: a backend was named that cannot serve `spec`; the message has its reasons.
    """
    lines: list[str] = []
    for candidate, module in _BACKENDS.items():
        if name not in ("auto", candidate):
            continue
        reasons, kernels = _try_backend(module, spec)
        if kernels is not None:
            return kernels, [*lines, f"kernels: {candidate}"]
        lines.append(f"kernels: not {candidate}: {'; '.join(reasons)}")
        if name == candidate:
            raise ConfigError(f"kernels={name} cannot be used: {'; '.join(reasons)}; use kernels=auto")
    return ReferenceKernels(), [*lines, "kernels: reference (plain PyTorch)"]


def _try_backend(module: str, spec: KernelSpec) -> tuple[list[str], Kernels | None]:
    if importlib.util.find_spec(module) is None:
        return ["not part of this release"], None
    backend = importlib.import_module(module).create()
    reasons = backend.supports(spec)
    return reasons, None if reasons else backend
