"""What a quantised weight is: integers, scales and zero points; turned back to floats, and packed into words.

One form for every scheme: `values` are unsigned (0..255 or 0..15) and a weight is scale * (value - zero), or a
codebook's entry times scale. Model folders have several layouts on disk; what reads one makes a `QuantizedWeight`, and
`Kernels.pack_linear` turns that into a backend's own layout. Choosing the values of weights is `fastserve.compress`. N
output features, K input features, G groups along K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastserve.core.errors import ConfigError

_GROUP_SIZES = (0, 32, 64, 128)
INT8_KV_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """How a linear layer is quantised.

    Attributes:
        weight_bits: 4 or 8.
        group_size: weights along K that share a scale; 0: one scale per output feature (8-bit, codebooks).
        is_symmetric: no zero points (the middle of the range stands for 0).
        activation_bits: 16: activations stay as they are; 8: quantised per token as they come, symmetric.
        has_codebook: 4-bit values are indices into 16 free levels (k-means).
    """

    weight_bits: int = 8
    group_size: int = 0
    is_symmetric: bool = True
    activation_bits: int = 16
    has_codebook: bool = False

    def __post_init__(self) -> None:
        reasons = []
        if self.weight_bits not in (4, 8):
            reasons.append(f"weight_bits is {self.weight_bits}; 4 and 8 exist")
        if self.group_size not in _GROUP_SIZES or (self.group_size and (self.weight_bits == 8 or self.has_codebook)):
            reasons.append(f"group_size is {self.group_size}; uniform 4-bit weights take {_GROUP_SIZES}, others 0")
        if self.activation_bits not in (8, 16):
            reasons.append(f"activation_bits is {self.activation_bits}; 8 and 16 exist")
        if self.has_codebook and (self.weight_bits != 4 or not self.is_symmetric or self.activation_bits != 16):
            reasons.append("a codebook has 4-bit indices, no zero points and 16-bit activations")
        if reasons:
            raise ConfigError("; ".join(reasons))

    @property
    def max_value(self) -> int:
        return (1 << self.weight_bits) - 1

    @property
    def centre(self) -> int:
        """The zero point of symmetric weights."""
        return 1 << (self.weight_bits - 1)


@dataclass(slots=True)
class QuantizedWeight:
    """A quantised matrix.

    Attributes:
        scheme: how to read the rest.
        values: [N, K] uint8.
        scales: [N, G] float32, bfloat16 or float16.
        zeros: [N, G] uint8, or None when symmetric.
        codebook: [16] float32, or None.
    """

    scheme: QuantScheme
    values: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    codebook: Tensor | None = None

    def dequantize(self) -> Tensor:
        """[N, K] float32."""
        num_inputs = self.values.shape[1]
        if self.codebook is not None:
            return self.codebook.float()[self.values.long()] * self.scales.float()
        group = self.scheme.group_size or num_inputs
        scales = self.scales.float().repeat_interleave(group, dim=1)[:, :num_inputs]
        if self.zeros is None:
            return (self.values.float() - self.scheme.centre) * scales
        zeros = self.zeros.float().repeat_interleave(group, dim=1)[:, :num_inputs]
        return (self.values.float() - zeros) * scales


def quantize_rows(weight: Tensor) -> QuantizedWeight:
    """A matrix [N, K] in 8 bits, for 8-bit activations: symmetric, one scale per row, the nearest integers."""
    wide = weight.float()
    scheme = QuantScheme(activation_bits=8)
    scales = wide.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return QuantizedWeight(scheme, ((wide / scales).round() + scheme.centre).to(torch.uint8), scales)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x [T, K] -> integers -127..127 as float32 [T, K] and scales [T, 1]: symmetric, per token, dynamic."""
    wide = x.float()
    top = wide.abs().amax(-1, keepdim=True)
    scales = torch.where(top > 0, top / 127.0, 1.0)
    return (wide * (1.0 / scales)).round(), scales


def pack_words(values: Tensor, num_bits: int) -> Tensor:
    """Values [N, K] uint8 -> int32 [N, ceil(K * bits / 32)], the first in the lowest bits, as compressed-tensors.

    Rows are streams of bits: a value of 3 or 6 bits may lie in two words.
    """
    rows = torch.nn.functional.pad(values, (0, -values.shape[1] % 32))
    if num_bits == 4:
        rows = rows[:, ::2] | rows[:, 1::2] << 4
    elif num_bits != 8:
        bits = (rows.unsqueeze(-1) >> torch.arange(num_bits, dtype=torch.uint8)) & 1
        rows = (bits.view(len(rows), -1, 8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    words = rows.reshape(-1).view(torch.int32).view(len(values), -1)
    return words[:, : -(-values.shape[1] * num_bits // 32)].contiguous()


def unpack_words(words: Tensor, num_bits: int, num_inputs: int) -> Tensor:
    """The inverse of `pack_words`: [N, num_inputs] uint8."""
    values = words.reshape(-1).view(torch.uint8).view(len(words), -1)
    if num_bits == 4:
        values = torch.stack((values & 15, values >> 4), dim=-1).view(words.shape[0], -1)
    elif num_bits != 8:
        bits = (values.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
        bits = bits.view(len(words), -1)[:, : num_inputs * num_bits].view(len(words), num_inputs, num_bits)
        values = (bits << torch.arange(num_bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    return values[:, :num_inputs].contiguous()


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
