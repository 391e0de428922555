"""Tensors of a quantised module -> `QuantizedWeight`, for every layout on disk that is supported.

Values become unsigned bytes, one per weight; scales keep their type. Weights of 2 or 3 bits are held in 4, those of 5
to 7 in 8, and what no kernel has as floats. The packing for a backend comes after (`Kernels.pack_linear`). N output
features, K input features, G groups along K; a word is 32 bits of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastserve.checkpoint import bitmask
from fastserve.checkpoint.quantization import QuantizedFormat
from fastserve.checkpoint.weights import WeightReader
from fastserve.core.errors import CheckpointError, ConfigError
from fastserve.kernels.quant import QuantizedWeight, QuantScheme, unpack_words

_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # where AWQ's words keep the columns 0..7
_INTEGERS = (torch.int8, torch.uint8, torch.int32)
_SCALES = (torch.float32, torch.bfloat16, torch.float16)

_Read = Callable[[str, tuple[int, ...]], Tensor]  # a tensor of the module, by suffix, which must have this shape


def read_quantized(
    reader: WeightReader, module: str, shape: tuple[int, int], layout: QuantizedFormat
) -> QuantizedWeight | Tensor:
    """The weight [N, K] of `module`; a tensor of floats where `layout.is_dense`.

    Raises:
        CheckpointError: tensors are missing, or of a wrong shape or type, or the scheme is one that no kernel has.
    """
    if layout.layout == bitmask.FORMAT:
        return bitmask.read(reader, module, shape)
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
        is_scale = suffix in ("weight_scale", "scales", "weight_codebook")
        if tensor.dtype not in (_SCALES if is_scale else _INTEGERS):
            raise CheckpointError(f"tensor {name} has type {tensor.dtype}, which its quantisation scheme does not have")
        return tensor

    num_outputs, num_inputs = shape
    groups = -(-num_inputs // (layout.group_size or num_inputs))
    if layout.layout in ("gptq", "gptq_v2", "awq"):
        return _read_transposed(read, scheme, shape, groups, layout.layout, f"{module}.g_idx" in reader)
    scale_shape = (num_outputs, groups)
    if reader.info(f"{module}.weight_scale").shape in ((), (1,)):  # one for the whole tensor
        scales = read("weight_scale", reader.shape(f"{module}.weight_scale")).expand(scale_shape).contiguous()
    else:
        scales = read("weight_scale", scale_shape)
    if layout.layout == "float-quantized":
        return reader.view(f"{module}.weight", shape).float() * scales.float()
    lift = scheme.centre - (1 << (layout.bits - 1))  # the same weights around the centre of more bits
    if layout.layout == "int-quantized":
        values = _unsigned(read("weight", shape), scheme)
    else:
        words = read("weight_packed", (num_outputs, _words(num_inputs, layout.bits)))
        values = unpack_words(words, layout.bits, num_inputs)
    if is_codebook:
        codebook = read("weight_codebook", (1 << layout.bits,)).float()
        return QuantizedWeight(
            scheme, values, scales, codebook=torch.nn.functional.pad(codebook, (0, 16 - len(codebook)))
        )
    zeros = None if scheme.is_symmetric else _read_zeros(reader, read, module, layout, scale_shape) + lift
    if layout.is_dense:
        centre = torch.full(scale_shape, scheme.centre) if zeros is None else zeros
        spread = [item.repeat_interleave(layout.group_size, dim=1)[:, :num_inputs] for item in (centre, scales)]
        return (values.float() + lift - spread[0]) * spread[1].float()
    return QuantizedWeight(scheme, values + lift, scales, zeros)


def _read_zeros(
    reader: WeightReader, read: _Read, module: str, layout: QuantizedFormat, shape: tuple[int, int]
) -> Tensor:
    """Zero points [N, G]: bytes, or words that are packed along N."""
    if reader.dtype(f"{module}.weight_zero_point") is not torch.int32:
        return read("weight_zero_point", shape).view(torch.uint8) + (1 << (layout.bits - 1))
    words = read("weight_zero_point", (_words(shape[0], layout.bits), shape[1]))
    return unpack_words(words.t(), layout.bits, shape[0]).t().contiguous()


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


def _unsigned(values: Tensor, scheme: QuantScheme) -> Tensor:
    """Signed bytes around 0 -> unsigned ones around the scheme's centre."""
    return values.view(torch.uint8) + scheme.centre


def _words(count: int, num_bits: int) -> int:
    return -(-count * num_bits // 32)
