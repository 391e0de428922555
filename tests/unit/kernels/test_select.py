"""Choosing kernels: the best that can serve the model, a named one or a clear refusal."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastserve.core.errors import ConfigError
from fastserve.kernels import select
from fastserve.kernels.interface import KernelSpec
from fastserve.kernels.reference import Kernels

SPEC = KernelSpec("cpu", torch.float32, 4, 2, 16, 16)


class Fussy(Kernels):
    name = "fussy"

    def supports(self, spec: KernelSpec) -> list[str]:
        return [] if spec.head_size == 32 else [f"head size {spec.head_size} is not 32"]


@pytest.fixture
def fussy(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("fussy_kernels")
    module.create = Fussy  # type: ignore[attr-defined]
    module.__spec__ = importlib_spec()
    monkeypatch.setitem(sys.modules, "fussy_kernels", module)
    monkeypatch.setattr(select, "_BACKENDS", {"triton": "no_such_kernels", "cpu": "fussy_kernels"})


def importlib_spec() -> object:
    import importlib.machinery

    return importlib.machinery.ModuleSpec("fussy_kernels", None)


def test_heads_that_the_native_kernels_have_no_room_for() -> None:
    from fastserve.kernels import cpu

    with pytest.raises(ConfigError, match="heads have 576 numbers; 512 at most"):
        select.select("cpu", KernelSpec("cpu", torch.float32, 4, 2, 576, 16))
    assert cpu.create().supports(KernelSpec("cpu", torch.float32, 4, 2, 512, 16)) == cpu.create().supports(SPEC)


def test_a_native_library_that_is_there_but_does_not_work_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastserve.kernels.cpu import kernels

    def fail(name: str) -> None:
        raise ImportError("undefined symbol: pack")

    with monkeypatch.context() as patch:
        patch.setattr(kernels.importlib, "import_module", fail)
        with pytest.raises(ConfigError, match=r"cannot be used: undefined symbol: pack.* kernels=reference"):
            kernels.create.__wrapped__()
    if sys.platform != "linux" or kernels.create().native_backend is None:
        pytest.skip("the native library was not built, or memory cannot be limited")
    monkeypatch.setattr(kernels, "usable_cpus", lambda: list(range(500)))
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), limits[1]))
    try:
        with pytest.raises(ConfigError, match=r"thread \d+ of 500 cannot be started"):
            kernels.create.__wrapped__()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_reference_when_asked_for() -> None:
    kernels, lines = select.select("reference", SPEC)
    assert kernels.name == "reference"
    assert lines == ["kernels: reference (plain PyTorch)"]


@pytest.mark.usefixtures("fussy")
def test_auto_takes_the_best_that_can_and_says_why_not() -> None:
    kernels, lines = select.select("auto", SPEC)
    assert kernels.name == "reference"
    assert lines[0] == "kernels: not cpu: head size 16 is not 32"
    able = KernelSpec("cpu", torch.float32, 4, 2, 32, 16)
    assert select.select("auto", able)[0].name == "fussy"
    assert select.select("cpu", able)[1] == ["kernels: cpu"]


@pytest.mark.usefixtures("fussy")
def test_a_named_backend_is_never_replaced_silently() -> None:
    with pytest.raises(ConfigError, match="head size 16 is not 32"):
        select.select("cpu", SPEC)
    with pytest.raises(ConfigError, match="this build does not have them"):
        select.select("triton", SPEC)
