"""A quantised weight, and the tensors on disk that one is read from, for every layout that is supported.

One form for every scheme: values are unsigned bytes, one per weight, and a weight is scale * (value - zero), or a
codebook's entry times scale. Weights of 2 or 3 bits are held in 4, those of 5 to 7 in 8, and what no kernel has as
floats. A backend's own layout is made of it by `Kernels.pack_linear`; choosing the values is `fastserve.compress`.
N output features, K input features, G groups along K; a word is 32 bits of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastserve.checkpoint import bitmask, factors
from fastserve.checkpoint.quantization import FACTORS_FORMAT, QuantizedFormat
from fastserve.checkpoint.weights import WeightReader
from fastserve.core.errors import CheckpointError, ConfigError

_GROUP_SIZES = (0, 32, 64, 128)
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where AWQ's words keep the columns 0..7
_SCALES = (torch.float32, torch.bfloat16, torch.float16)
# Types of a module's tensors by suffix; all others are words.
_TYPES = {
    "weight": (torch.int8,),
    "weight_zero_point": (torch.int8, torch.int32),
    **dict.fromkeys(("weight_scale", "scales", "weight_codebook"), _SCALES),
}

_Read = Callable[[str, tuple[int, ...]], Tensor]  # a tensor of the module, by suffix, which must have this shape


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


def read_quantized(
    reader: WeightReader, module: str, shape: tuple[int, int], layout: QuantizedFormat
) -> QuantizedWeight | Tensor:
    """The weight [N, K] of `module`; a tensor of floats where `layout.is_dense`.

    Raises:
        CheckpointError: tensors are missing, or of a wrong shape or type, or the scheme is one that no kernel has.
    """
    if layout.layout == bitmask.FORMAT:
        return bitmask.read(reader, module, shape)
    if layout.layout == FACTORS_FORMAT:
        return factors.read(reader, module, shape)
    is_codebook = layout.layout == "codebook"
    held_bits, group_size = (4 if layout.bits <= 4 else 8), (0 if layout.is_dense else layout.group_size)
    try:
        scheme = QuantScheme(
            held_bits, group_size, layout.is_symmetric, layout.activation_bits, has_codebook=is_codebook
        )
    except ConfigError as error:
        raise CheckpointError(f"{module} cannot be served in its quantised form: {error}") from error

    def read(suffix: str, expected: tuple[int, ...]) -> Tensor:
        name = f"{module}.{suffix}"
        tensor = reader.view(name, expected)
        if tensor.dtype not in _TYPES.get(suffix, (torch.int32,)):
            raise CheckpointError(f"tensor {name} has type {tensor.dtype}, which its quantisation scheme does not have")
        return tensor

    def read_per_group(suffix: str) -> Tensor:
        """[N, G], of which there may be one for the whole tensor."""
        found = reader.shape(f"{module}.{suffix}")
        return read(suffix, found if found in ((), (1,)) else scale_shape).expand(scale_shape).contiguous()

    num_outputs, num_inputs = shape
    groups = -(-num_inputs // (layout.group_size or num_inputs))
    if layout.layout in ("gptq", "gptq_v2", "awq"):
        return _read_transposed(read, scheme, shape, groups, layout.layout, f"{module}.g_idx" in reader)
    scale_shape = (num_outputs, groups)
    scales = read_per_group("weight_scale")
    if layout.layout == "float-quantized":
        return reader.view(f"{module}.weight", shape).float() * scales.float()
    lift = scheme.centre - (1 << (layout.bits - 1))  # the same weights around the centre of more bits
    if layout.layout == "int-quantized":
        values = _unsigned(read("weight", shape), layout.bits)
    else:
        words = read("weight_packed", (num_outputs, _words(num_inputs, layout.bits)))
        values = unpack_words(words, layout.bits, num_inputs)
    if is_codebook:
        codebook = read("weight_codebook", (1 << layout.bits,)).float()
        return QuantizedWeight(
            scheme, values, scales, codebook=torch.nn.functional.pad(codebook, (0, 16 - len(codebook)))
        )
    zeros: Tensor | None = None
    if not scheme.is_symmetric and reader.dtype(f"{module}.weight_zero_point") is torch.int32:  # packed along N
        words = read("weight_zero_point", (_words(num_outputs, layout.bits), groups))
        zeros = unpack_words(words.t(), layout.bits, num_outputs).t().contiguous() + lift
    elif not scheme.is_symmetric:
        zeros = _unsigned(read_per_group("weight_zero_point"), layout.bits) + lift
    if layout.is_dense:
        centre = torch.full(scale_shape, scheme.centre) if zeros is None else zeros
        spread = [item.repeat_interleave(layout.group_size, dim=1)[:, :num_inputs] for item in (centre, scales)]
        return (values.float() + lift - spread[0]) * spread[1].float()
    return QuantizedWeight(scheme, values + lift, scales, zeros)


def _read_transposed(
    read: _Read, scheme: QuantScheme, shape: tuple[int, int], groups: int, layout: str, is_ordered: bool
) -> QuantizedWeight:
    """GPTQ and AWQ keep weights as [K, N], AWQ with words along N in an order of its own."""
    num_outputs, num_inputs = shape
    if layout == "awq":
        words = read("qweight", (num_inputs, _words(num_outputs, scheme.weight_bits)))
        values = _awq_columns(unpack_words(words, scheme.weight_bits, num_outputs)).t().contiguous()
    else:
        words = read("qweight", (_words(num_inputs, scheme.weight_bits), num_outputs))
        values = unpack_words(words.t(), scheme.weight_bits, num_inputs)
        if is_ordered:
            order = torch.arange(num_inputs, dtype=torch.int32) // (scheme.group_size or num_inputs)
            if not torch.equal(read("g_idx", (num_inputs,)), order):
                raise CheckpointError(
                    "GPTQ weights with reordered columns (desc_act: true) cannot be served; quantise with "
                    "desc_act: false, or with compressed-tensors and actorder: weight"
                )
    scales = read("scales", (groups, num_outputs)).t().contiguous()
    zeros: Tensor | None = unpack_words(
        read("qzeros", (groups, _words(num_outputs, scheme.weight_bits))), scheme.weight_bits, num_outputs
    )
    assert zeros is not None
    if layout == "awq":
        zeros = _awq_columns(zeros)
    elif layout == "gptq":
        zeros = (zeros + 1) & scheme.max_value  # the first GPTQ layout keeps zero points less one
    zeros = zeros.t().contiguous()
    if scheme.is_symmetric:
        if not bool((zeros == scheme.centre).all()):
            raise CheckpointError(
                "config.json calls the weights symmetric, but their zero points are not in the middle"
            )
        zeros = None
    return QuantizedWeight(scheme, values, scales, zeros)


def _awq_columns(values: Tensor) -> Tensor:
    return values.view(values.shape[0], -1, 8)[..., _AWQ_ORDER].reshape(values.shape[0], -1)


def _unsigned(values: Tensor, num_bits: int) -> Tensor:
    """Signed bytes around 0 -> unsigned ones around the centre of `num_bits`."""
    return values.view(torch.uint8) + (1 << (num_bits - 1))


def is_empty_bias(reader: WeightReader, name: str) -> bool:
    """Whether this is a bias of zeros, which older GPTQ tools gave to every module."""
    module, _, suffix = name.rpartition(".")
    return suffix == "bias" and f"{module}.qweight" in reader and not reader.view(name, reader.shape(name)).any()


def _words(count: int, num_bits: int) -> int:
    return -(-count * num_bits // 32)


def pack_words(values: Tensor, num_bits: int) -> Tensor:
    """Values [N, K] uint8 -> int32 [N, ceil(K * bits / 32)], the first in the lowest bits, as compressed-tensors.

    Rows are streams of bits: a value of 3 or 6 bits may lie in two words.
    """
    rows = torch.nn.functional.pad(values, (0, -values.shape[1] % 32)) if values.shape[1] % 32 else values
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
