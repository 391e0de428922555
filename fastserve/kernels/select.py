"""Choose the kernels once, at load, and say which and why not the others."""

from __future__ import annotations

import importlib.util
import os

from fastserve.core.errors import ConfigError
from fastserve.kernels.interface import KernelSpec
from fastserve.kernels.reference import Kernels

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
    isa = os.environ.get("FASTSERVE_ISA", "")
    options = {"cpu": {"isa": isa}} if isa else {}
    for candidate, module in _BACKENDS.items():
        is_present = importlib.util.find_spec(module) is not None
        if name != candidate and (name != "auto" or not is_present):
            continue
        backend = importlib.import_module(module).create(**options.get(candidate, {})) if is_present else None
        reasons = backend.supports(spec) if backend else ["this build does not have them"]
        if backend and not reasons:
            return backend, [*lines, f"kernels: {candidate}" + (f" ({backend.isa})" if hasattr(backend, "isa") else "")]
        if name == candidate:
            raise ConfigError(f"kernels={name} cannot be used: {'; '.join(reasons)}; use kernels=auto")
        lines.append(f"kernels: not {candidate}: {'; '.join(reasons)}")
    return Kernels(), [*lines, "kernels: reference (plain PyTorch)"]
