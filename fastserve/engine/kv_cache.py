"""The tensors behind the scheduler's block ids: per layer, keys and values [num_blocks, block_size, G, D].

G key/value heads, D head size; int8 caches have D + 4, see `kernels/quant.py:int8_kv_views`. The memory is touched when
it is made, so that what was planned is really there and the process does not grow while serving.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastserve.kernels.interface import Kernels
from fastserve.kernels.quant import INT8_KV_SCALE_BYTES


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
        self.keys: list[Tensor] = [torch.empty(shape, dtype=dtype, device=device).zero_() for _ in range(num_layers)]
        self.values: list[Tensor] = [torch.empty(shape, dtype=dtype, device=device).zero_() for _ in range(num_layers)]

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
