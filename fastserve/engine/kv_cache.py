"""The tensors behind the scheduler's block ids: per layer, keys and values [max_blocks, block_size, G, D].

G key/value heads, D head size. Addresses are reserved for the largest size the cache may ever have; memory is taken for
the first `num_blocks` only, and touched then, so that what was planned is really there and the process grows at no
other time. Giving blocks back returns their pages to the system (docs/decisions/0021-kv-tiers.md).
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

from fastserve.kernels.interface import Kernels


class KVCache:
    """Keys and values of all layers.

    Args:
        num_layers, num_blocks, block_size, num_kv_heads, head_size: shape.
        dtype, device: of the tensors.
        max_blocks: most blocks `resize` can give; 0 for `num_blocks`. Beyond the CPU no more than `num_blocks`.
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
        max_blocks: int = 0,
    ) -> None:
        self.num_blocks = 0
        self.max_blocks = max(max_blocks, num_blocks) if device.type == "cpu" else num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self._pages: mmap.mmap | None = None
        shape = (2 * num_layers, self.max_blocks, block_size, num_kv_heads, head_size)
        memory = self._reserve(shape, dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)
        self.keys: list[Tensor] = list(memory[:num_layers])
        self.values: list[Tensor] = list(memory[num_layers:])
        self.resize(num_blocks)

    @property
    def parts(self) -> list[Tensor]:
        """Every tensor that holds a piece of each block, [max_blocks, ...]."""
        return [*self.keys, *self.values]

    def copy_blocks(self, pairs: list[tuple[int, int]], kernels: Kernels) -> None:
        """Copy blocks source -> target in every layer."""
        for keys, values in zip(self.keys, self.values, strict=True):
            kernels.copy_blocks(keys, values, pairs)

    def resize(self, num_blocks: int) -> None:
        """Take or give back memory so that the first `num_blocks` blocks have some; new ones are zero."""
        assert 0 < num_blocks <= self.max_blocks
        old, self.num_blocks = self.num_blocks, num_blocks
        for part in self.parts:
            part[old:num_blocks].zero_()
            if num_blocks < old and self._pages is not None:
                self._release(part, num_blocks, old)

    def _reserve(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self._pages = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(self._pages, dtype=dtype).view(shape)

    def _release(self, part: Tensor, first: int, last: int) -> None:
        """Hand the whole pages of blocks first .. last - 1 to the system."""
        assert self._pages is not None
        size = part[0].numel() * part.itemsize
        offset = part.storage_offset() * part.itemsize
        start = -(-(offset + first * size) // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (offset + last * size) // mmap.PAGESIZE * mmap.PAGESIZE
        if start < end:
            self._pages.madvise(mmap.MADV_DONTNEED, start, end - start)

    @staticmethod
    def block_bytes(num_layers: int, block_size: int, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers, keys and values."""
        return 2 * num_layers * block_size * num_kv_heads * head_size * dtype.itemsize
