"""The tensors behind the scheduler's block ids: per layer, keys and values [num_blocks, block_size, G, D].

G key/value heads, D head size; int8 caches have D + 4, see `kernels/quant.py:int8_kv_views`. The memory is touched when
it is made, so that what was planned is really there and the process does not grow while serving. On Linux that is done
in the background, on huge pages where the system has them: the first request need not wait for gigabytes of zeros.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import threading

import torch
from torch import Tensor

from fastserve.kernels.interface import Kernels
from fastserve.kernels.quant import INT8_KV_SCALE_BYTES

_HUGE_PAGE = 2 << 20
_TOUCHED_AT_ONCE = 16 << 20
_MADV_POPULATE_WRITE = 23  # linux/mman.h


class KVCache:
    """Keys and values of all layers.

    Args:
        num_layers, num_blocks, block_size, num_kv_heads, head_size: shape.
        dtype, device: of the tensors.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_blocks, block_size, num_kv_heads, _row_bytes(head_size, dtype) // dtype.itemsize)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        memory = _zeros((2 * num_layers, *shape), dtype, device)
        self.keys: list[Tensor] = list(memory[:num_layers])
        self.values: list[Tensor] = list(memory[num_layers:])

    def copy_blocks(self, pairs: list[tuple[int, int]], kernels: Kernels) -> None:
        """Copy blocks source -> target in every layer."""
        for keys, values in zip(self.keys, self.values, strict=True):
            kernels.copy_blocks(keys, values, pairs)

    @staticmethod
    def block_bytes(num_layers: int, block_size: int, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers, keys and values."""
        return 2 * num_layers * block_size * num_kv_heads * _row_bytes(head_size, dtype)


def _row_bytes(head_size: int, dtype: torch.dtype) -> int:
    """Bytes of one head of one token, keys or values."""
    return head_size * dtype.itemsize + (INT8_KV_SCALE_BYTES if dtype is torch.int8 else 0)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or sys.platform != "linux" or num_bytes < _HUGE_PAGE:
        return torch.empty(shape, dtype=dtype, device=device).zero_()
    mapped = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapped.madvise(mmap.MADV_HUGEPAGE)  # a wish: small pages work too
    memory = torch.frombuffer(mapped, dtype=dtype)
    if _populate(memory, 0, _HUGE_PAGE):
        threading.Thread(target=_touch, args=(memory,), name="touch-kv-cache", daemon=True).start()
    else:  # Linux before 5.14
        memory.zero_()
    return memory.view(shape)


def _touch(memory: Tensor) -> None:
    """Have the system give the memory now, in steps, so that nobody waits long for its lock; contents stay."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # of this thread: requests go first
    for start in range(0, memory.nbytes, _TOUCHED_AT_ONCE):
        _populate(memory, start, min(_TOUCHED_AT_ONCE, memory.nbytes - start))


def _populate(memory: Tensor, start: int, num_bytes: int) -> bool:
    address = ctypes.c_void_p(memory.data_ptr() + start)
    result: int = ctypes.CDLL(None).madvise(address, ctypes.c_size_t(num_bytes), _MADV_POPULATE_WRITE)
    return result == 0
