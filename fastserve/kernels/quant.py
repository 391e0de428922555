"""Arithmetic on quantised numbers: parts of a matrix, activations, and keys and values of an int8 cache.

Legend: T tokens, N output features, K input features, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastserve.checkpoint.quantized import QuantizedWeight, QuantScheme

INT8_KV_SCALE_BYTES = 4


def quantize_rows(weight: Tensor) -> QuantizedWeight:
    """A matrix [N, K] in 8 bits, for 8-bit activations: symmetric, one scale per row, the nearest integers."""
    wide, scheme = weight.float(), QuantScheme(activation_bits=8)
    scales = wide.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return QuantizedWeight(scheme, ((wide / scales).round() + scheme.centre).to(torch.uint8), scales)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x [T, K] -> integers -127..127 as float32 [T, K] and scales [T, 1]: symmetric, per token, dynamic."""
    wide = x.float()
    top = wide.abs().amax(-1, keepdim=True)
    scales = torch.where(top > 0, top / 127.0, 1.0)
    return (wide * (1.0 / scales)).round(), scales


def concatenate(parts: Sequence[Tensor | QuantizedWeight]) -> Tensor | QuantizedWeight:
    """Parts of one matrix, all of one scheme and codebook, below each other. Always a copy."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat([part for part in parts if isinstance(part, Tensor)])
    quantized = [part for part in parts if isinstance(part, QuantizedWeight)]
    zeros = [part.zeros for part in quantized if part.zeros is not None]
    return QuantizedWeight(
        first.scheme,
        torch.cat([part.values for part in quantized]),
        torch.cat([part.scales for part in quantized]),
        torch.cat(zeros) if zeros else None,
        first.codebook,
    )


def reordered(weight: Tensor | QuantizedWeight, order: Tensor) -> Tensor | QuantizedWeight:
    """The matrix with its rows in another order; order [N] int64."""
    if isinstance(weight, Tensor):
        return weight[order]
    zeros = None if weight.zeros is None else weight.zeros[order]
    return QuantizedWeight(weight.scheme, weight.values[order], weight.scales[order], zeros, weight.codebook)


def int8_kv_views(cache: Tensor) -> tuple[Tensor, Tensor]:
    """What an int8 cache [num_blocks, block_size, G, D + 4] holds: bytes [num_blocks, block_size, G, D] and their
    float32 scales [num_blocks, block_size, G], both views of it.

    In memory a block is [G, block_size, D] bytes, then [G, block_size] scales: what one head's attention reads is
    contiguous. The four bytes of a scale are counted to D, so that shape and size are those of any cache.
    """
    num_blocks, block_size, num_kv_heads, width = cache.shape
    size = width - INT8_KV_SCALE_BYTES
    flat = cache.view(num_blocks, -1)
    split = block_size * num_kv_heads * size
    values = flat[:, :split].unflatten(1, (num_kv_heads, block_size, size))
    scales = flat[:, split:].view(torch.float32).unflatten(1, (num_kv_heads, block_size))
    return values.transpose(1, 2), scales.transpose(1, 2)


def quantize_kv(x: Tensor) -> tuple[Tensor, Tensor]:
    """Keys or values [..., D] -> int8 [..., D] and float32 scales [...]: symmetric, one scale per token and head."""
    wide = x.float()
    scales = wide.abs().amax(-1) / 127
    return (wide / scales.where(scales > 0, 1.0).unsqueeze(-1)).round().to(torch.int8), scales
