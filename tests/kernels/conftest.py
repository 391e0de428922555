"""Native kernels of every instruction set that this machine has, with one thread and with two."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest

from fastserve.kernels.cpu import CPUKernels

ISAS = ("plain", "avx2", "avx512", "avx512_vnni_bf16", "amx")
_cache: dict[tuple[str, int], CPUKernels] = {}


def load_native() -> ModuleType | None:
    try:
        return importlib.import_module("fastserve.kernels.cpu._native")
    except ImportError:
        return None


def native_kernels(isa: str, num_threads: int = 2) -> CPUKernels:
    """Kernels of one instruction set; skips the test where the machine or the build lacks it."""
    native = load_native()
    if native is None:
        pytest.skip("the native library was not built")
    if isa not in native.available_isas():
        pytest.skip(f"this machine has no {isa}")
    key = isa, num_threads
    if key not in _cache:
        _cache[key] = CPUKernels(native.Backend(isa, num_threads))
    return _cache[key]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def kernels(isa: str) -> CPUKernels:
    return native_kernels(isa)
