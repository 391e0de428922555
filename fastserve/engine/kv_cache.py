"""The tensors behind the scheduler's block ids: per layer, keys and values [max_blocks, block_size, G, D].

G key/value heads, D head size; int8 caches have D + 4, see `kernels/quant.py:int8_kv_views`. How a block has its bytes
is the kernels' own affair; all others copy whole blocks. Addresses are reserved for the largest size the cache may ever
have; memory is taken for the first `num_blocks` only, and touched then (at first in the background), so that the
process grows at no other time. Blocks that are given up return their pages to the system
(docs/decisions/0021-kv-tiers.md).
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from fastserve.core.pages import Pages
from fastserve.kernels.quant import INT8_KV_SCALE_BYTES
from fastserve.models.model import ModelShape

_HUGE_PAGE = 2 << 20  # smaller caches are plain tensors


class KVCache:
    """Keys and values of all layers.

    max_blocks: most blocks `resize` can give; elsewhere than on a CPU under Linux it gives `num_blocks` at most.
    """

    def __init__(
        self, shape: ModelShape, block_size: int, num_blocks: int, max_blocks: int, device: torch.device, is_int8: bool
    ) -> None:
        num_layers, dtype = shape.num_layers, torch.int8 if is_int8 else shape.dtype
        self.num_blocks = num_blocks
        can_resize = device.type == "cpu" and sys.platform == "linux"
        self.max_blocks = max(max_blocks, num_blocks) if can_resize else num_blocks
        numbers = _row_bytes(shape, is_int8) // dtype.itemsize
        part_shape = (self.max_blocks, block_size, shape.num_kv_heads, numbers)
        self.block_size = block_size
        self.dtype = dtype
        self._part_bytes = math.prod(part_shape) * dtype.itemsize
        self._pages: Pages | None = None
        num_bytes = 2 * num_layers * self._part_bytes
        if can_resize and num_bytes >= _HUGE_PAGE:
            self._pages = Pages(num_bytes)
            memory = torch.frombuffer(self._pages.memory, dtype=dtype).view(2 * num_layers, *part_shape)
        else:
            memory = torch.empty((2 * num_layers, *part_shape), dtype=dtype, device=device).zero_()
        self.keys: list[Tensor] = list(memory[:num_layers])
        self.values: list[Tensor] = list(memory[num_layers:])
        if self._pages is not None:
            self._pages.take_later(self._ranges(0, num_blocks))

    @property
    def parts(self) -> list[Tensor]:
        """Every tensor that holds a piece of each block, [max_blocks, ...]."""
        return [*self.keys, *self.values]

    def resize(self, num_blocks: int) -> None:
        """Take or give back memory so that the first `num_blocks` blocks have some; nothing is said of what new ones
        hold."""
        assert 0 < num_blocks <= self.max_blocks
        old, self.num_blocks = self.num_blocks, num_blocks
        if self._pages is not None and num_blocks > old:
            self._pages.take(self._ranges(old, num_blocks))
        elif self._pages is not None and num_blocks < old:
            self._pages.give_back(self._ranges(num_blocks, old))

    def _ranges(self, first: int, last: int) -> list[tuple[int, int]]:
        """Bytes of blocks first .. last - 1."""
        total = len(self.parts) * self._part_bytes
        if last - first == self.max_blocks:
            return [(0, total)]
        size = self._part_bytes // self.max_blocks
        return [(start + first * size, start + last * size) for start in range(0, total, self._part_bytes)]

    @staticmethod
    def block_bytes(shape: ModelShape, block_size: int, is_int8: bool) -> int:
        """Bytes of one block over all layers, keys and values."""
        return 2 * shape.num_layers * block_size * shape.num_kv_heads * _row_bytes(shape, is_int8)


def _row_bytes(shape: ModelShape, is_int8: bool) -> int:
    """Bytes of one head of one token, keys or values."""
    return shape.head_size + INT8_KV_SCALE_BYTES if is_int8 else shape.head_size * shape.dtype.itemsize
