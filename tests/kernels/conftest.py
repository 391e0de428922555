"""Native kernels of every instruction set that this machine has, with one thread and with two."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastserve.kernels.cpu import CPUKernels
from fastserve.kernels.quant import INT8_KV_SCALE_BYTES

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


def cache_rows(cache: Tensor, *, is_keys: bool) -> Tensor:
    """A native cache [blocks, block_size, G, D] in the reference's order; bytes of an int8 one. D fills words."""
    blocks, block_size, heads, size = cache.shape
    flat = cache.view(blocks, -1)
    if cache.dtype is torch.int8:
        size -= INT8_KV_SCALE_BYTES
        flat = flat[:, : heads * block_size * size]
    if not is_keys:
        return flat.reshape(blocks, heads, block_size, size).transpose(1, 2)
    each = 4 // cache.element_size()
    words = flat.reshape(blocks, heads, size // each, block_size, each)
    return words.permute(0, 3, 1, 2, 4).reshape(blocks, block_size, heads, size)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def kernels(isa: str) -> CPUKernels:
    return native_kernels(isa)
