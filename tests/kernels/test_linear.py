"""Matrix products of every format and instruction set against float64, and the identities that must hold to the bit.

Tolerances are relative to the largest output. Products of exact operands summed in float32 differ from float64 by
rounding alone (2e-6); 8-bit activations are compared with the reference's own quantisation; bfloat16 outputs round once
(2^-8).
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from fastserve.bench.rounding import quantize
from fastserve.checkpoint.quantized import QuantizedWeight, QuantScheme
from fastserve.kernels.interface import PackedLinear
from fastserve.kernels.quant import quantize_activations
from fastserve.kernels.reference import Kernels
from tests.kernels.conftest import native_kernels

SHAPES = [(1, 1), (16, 64), (33, 70), (64, 128), (100, 200), (130, 1088), (256, 512)]  # N, K
ROWS = (1, 2, 3, 4, 5, 6, 7, 13, 200)
FORMATS = {
    "float32": None,
    "bfloat16": None,
    "int8": QuantScheme(8),
    "int8-asymmetric": QuantScheme(8, is_symmetric=False),
    "int8-activations8": QuantScheme(8, activation_bits=8),
    "int8-asymmetric-activations8": QuantScheme(8, is_symmetric=False, activation_bits=8),
    "int4-group32": QuantScheme(4, 32),
    "int4-group64-asymmetric": QuantScheme(4, 64, is_symmetric=False),
    "int4-group128": QuantScheme(4, 128),
    "int4-channel": QuantScheme(4),
    "int4-group32-activations8": QuantScheme(4, 32, activation_bits=8),
    "int4-group64-asymmetric-activations8": QuantScheme(4, 64, is_symmetric=False, activation_bits=8),
    "int4-group128-asymmetric-activations8": QuantScheme(4, 128, is_symmetric=False, activation_bits=8),
    "codebook": QuantScheme(4, has_codebook=True),
}


def make_weight(name: str, num_outputs: int, num_inputs: int) -> Tensor | QuantizedWeight:
    weight = torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(num_outputs + num_inputs))
    scheme = FORMATS[name]
    if scheme is None:
        return weight.to(getattr(torch, name))
    scale_dtype = {32: torch.bfloat16, 64: torch.float16}.get(scheme.group_size, torch.float32)
    return quantize(weight, scheme, scale_dtype)


def exact(weight: Tensor | QuantizedWeight, x: Tensor, isa: str) -> Tensor:
    """The product in float64, with the activations that the kernels really multiply."""
    wide = x.double()
    if isinstance(weight, QuantizedWeight):
        if weight.scheme.activation_bits == 8:
            values, scales = quantize_activations(x)
            wide = values.double() * scales.double()
        if weight.codebook is not None and x.dtype is torch.bfloat16 and isa in ("avx512_vnni_bf16", "amx"):
            # bfloat16 units read the codebook in bfloat16.
            levels = weight.codebook.to(torch.bfloat16).float()
            weight = QuantizedWeight(weight.scheme, weight.values, weight.scales, codebook=levels)
        return wide @ weight.dequantize().double().T
    return wide @ weight.double().T


def make_rows(num_rows: int, num_inputs: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(num_rows, num_inputs, generator=torch.Generator().manual_seed(num_inputs)).to(dtype)


def assert_close(result: Tensor, expected: Tensor, tolerance: float) -> None:
    largest = expected.abs().max().clamp(min=1e-6)
    error = float((result.double() - expected).abs().max() / largest)
    assert error <= tolerance, f"relative error {error:.2e} above {tolerance:.0e}"


def test_packing_keeps_every_weight(isa: str) -> None:
    kernels = native_kernels(isa)
    for name in FORMATS:
        for num_outputs, num_inputs in SHAPES:
            weight = make_weight(name, num_outputs, num_inputs)
            back = torch.empty(num_outputs, num_inputs)
            kernels.pack_linear(weight, None).native.unpack(back.data_ptr())
            expected = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight.float()
            assert torch.equal(back, expected), (name, num_outputs, num_inputs)


@pytest.mark.parametrize("name", FORMATS)
def test_parts_are_one_matrix_and_its_rows_can_be_looked_up(isa: str, name: str) -> None:
    native, reference = native_kernels(isa), Kernels()
    first, second, third = parts = [make_weight(name, rows, 200) for rows in (70, 33, 1)]
    if isinstance(first, QuantizedWeight) and first.codebook is not None:
        parts = [first, *(dataclasses.replace(item, codebook=first.codebook) for item in (second, third))]
    packed, expected = (kernels.pack_linear(parts, None) for kernels in (native, reference))
    back = torch.empty(104, 200)
    packed.native.unpack(back.data_ptr())
    assert torch.equal(back, expected.weight.float())
    for ids in (
        torch.tensor([103, 0, 69, 70, 70, 102]),
        torch.arange(104).repeat(3),
        torch.tensor([], dtype=torch.int64),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            rows = native.embed(packed, ids, dtype)
            assert rows.dtype is dtype
            assert torch.equal(rows, reference.embed(expected, ids, dtype))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["x32", "x16"])
def test_products_are_right_and_do_not_depend_on_the_batch(isa: str, name: str, dtype: torch.dtype) -> None:
    kernels = native_kernels(isa)
    if name == "float32" and dtype is torch.bfloat16:
        pytest.skip("float32 weights take float32 activations in every model")
    tolerance = 2e-6 if dtype is torch.float32 else 2**-8
    if "activations8" in name:
        tolerance = max(tolerance, 1e-5)  # the scale itself is rounded
    for num_outputs, num_inputs in SHAPES:
        weight = make_weight(name, num_outputs, num_inputs)
        packed = kernels.pack_linear(weight, None)
        x = make_rows(max(ROWS), num_inputs, dtype)
        whole = kernels.linear(packed, x)
        assert_close(whole, exact(weight, x, isa), tolerance)
        for num_rows in ROWS:
            assert torch.equal(kernels.linear(packed, x[:num_rows]), whole[:num_rows]), (
                num_outputs,
                num_inputs,
                num_rows,
            )
        assert torch.equal(kernels.linear(packed, x[37:42]), whole[37:42])


@pytest.mark.parametrize("name", FORMATS)
def test_threads_do_not_change_a_bit(isa: str, name: str) -> None:
    one, two, three = (native_kernels(isa, count) for count in (1, 2, 3))
    dtype = torch.float32 if name == "float32" else torch.bfloat16
    weight = make_weight(name, 100, 200)
    for num_rows in (1, 5, 100):
        x = make_rows(num_rows, 200, dtype)
        results = [kernels.linear(kernels.pack_linear(weight, None), x) for kernels in (one, two, three)]
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("activation", ["", "silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("is_gated", [False, True])
def test_fused_epilogue_is_the_reference_s(isa: str, activation: str, is_gated: bool) -> None:
    kernels, reference = native_kernels(isa), Kernels()
    if is_gated and not activation:
        pytest.skip("a gated layer has an activation")
    for num_outputs, num_inputs in [(2, 16), (66, 100), (200, 64), (256, 128)]:
        weight = torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(1))
        bias = torch.randn(num_outputs, generator=torch.Generator().manual_seed(2))
        width = num_outputs // 2 if is_gated else num_outputs
        for num_rows in (1, 9):
            x = make_rows(num_rows, num_inputs, torch.float32)
            residual = make_rows(num_rows, width, torch.float32)
            results = [
                backend.linear(backend.pack_linear(weight, bias, is_gated), x, activation, residual)
                for backend in (kernels, reference)
            ]
            assert_close(results[0], results[1].double(), 4e-6)
            bare = [
                backend.linear(backend.pack_linear(weight, None, is_gated), x, activation)
                for backend in (kernels, reference)
            ]
            assert_close(bare[0], bare[1].double(), 4e-6)


def test_strided_rows_and_outputs_in_place(kernels: object, isa: str) -> None:
    native = native_kernels(isa)
    weight = make_weight("bfloat16", 96, 128)
    packed = native.pack_linear(weight, None)
    wide = make_rows(20, 300, torch.bfloat16)
    assert torch.equal(native.linear(packed, wide[:, 10:138]), native.linear(packed, wide[:, 10:138].contiguous()))
    assert native.linear(packed, wide[:0, :128]).shape == (0, 96)


def test_eight_bit_sums_are_the_same_for_every_instruction_set() -> None:
    results = []
    weight = quantize(
        torch.randn(64, 1088, generator=torch.Generator().manual_seed(4)), QuantScheme(8, activation_bits=8)
    )
    x = make_rows(7, 1088, torch.float32)
    for name in ("plain", "avx2", "avx512", "avx512_vnni_bf16"):
        try:
            kernels = native_kernels(name)
        except pytest.skip.Exception:
            continue
        results.append(kernels.linear(kernels.pack_linear(weight, None), x))
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["x32", "x16"])
def test_a_nan_or_infinity_among_eight_bit_activations_is_not_lost(isa: str, dtype: torch.dtype) -> None:
    for name in ("int8-asymmetric-activations8", "int4-group32-activations8"):
        weight, x = make_weight(name, 33, 70), make_rows(9, 70, dtype)
        for kernels in (native_kernels(isa), Kernels()):
            packed = kernels.pack_linear(weight, None)
            expected, broken = kernels.linear(packed, x), x.clone()
            for row, column, number in ((0, 0, math.nan), (3, 33, math.nan), (5, 69, -math.inf), (6, 40, math.nan)):
                broken[row, column] = number
                expected[row] = math.nan
            for count in (1, 4, 9):
                torch.testing.assert_close(kernels.linear(packed, broken[:count]), expected[:count], equal_nan=True)


def test_refusals_name_the_reason(isa: str) -> None:
    kernels = native_kernels(isa)
    with pytest.raises(ValueError, match="even number of rows"):
        kernels.pack_linear(torch.zeros(3, 8), None, is_gated=True)
    with pytest.raises(ValueError, match="at least one row"):
        kernels.pack_linear(torch.zeros(0, 8), None)
    packed = kernels.pack_linear(torch.zeros(4, 8), None)
    with pytest.raises(ValueError, match="the input of a linear has a shape"):
        kernels.linear(packed, torch.zeros(2, 7))
    with pytest.raises(ValueError, match="the residual of a linear has a shape"):
        kernels.linear(packed, torch.zeros(2, 8), residual=torch.zeros(1, 4))


def test_packed_layer_frees_what_it_was_made_from() -> None:
    kernels = native_kernels("plain")
    packed = kernels.pack_linear(torch.randn(64, 64), None)
    assert isinstance(packed, PackedLinear)
    assert packed.weight.numel() == 0
    assert packed.native.bytes == 64 * 64 * 4


@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["x32", "x16"])
def test_adapters_are_added_before_the_epilogue(isa: str, dtype: torch.dtype, is_gated: bool) -> None:
    """Two parts with ranks of their own, slots of 3 and 10 ranks, one empty, rows without any; each row as if alone."""
    generator = torch.Generator().manual_seed(1)
    for num_outputs, num_inputs in ((70, 33), (200, 130), (64, 512)):
        weight = torch.randn(num_outputs, num_inputs, generator=generator).to(dtype)
        bias, x = torch.randn(num_outputs, generator=generator), make_rows(13, num_inputs, dtype)
        pairs = []
        for ranks in (3, 10):
            b = torch.randn(num_outputs, ranks, generator=generator)
            b[: num_outputs // 2, ranks // 2 :] = 0.0
            b[num_outputs // 2 :, : ranks // 2] = 0.0
            pairs.append(((torch.randn(ranks, num_inputs, generator=generator) / num_inputs**0.5), b))
        slots = torch.tensor([1, 0, -1, 2, 1, 1, -1, 0, 0, 1, 2, -1, 0])
        results = []
        for kernels in (Kernels(), native_kernels(isa)):
            packed = kernels.pack_linear(weight, bias, is_gated)
            step: list[Tensor | None] = [slots]
            kernels.allow_adapters(packed, step, 3)
            for slot, pair in enumerate(pairs):
                kernels.set_adapter(packed, slot, pair, dtype)
            activation = "silu" if is_gated else "relu"
            results.append(kernels.linear(packed, x, activation))
            for row in range(len(x)):
                step[0] = slots[row : row + 1]
                alone = kernels.linear(packed, x[row : row + 1], activation)
                if kernels.name == "cpu":
                    assert torch.equal(alone[0], results[-1][row])
            step[0] = slots
            kernels.set_adapter(packed, 0, None, dtype)
            without = kernels.linear(packed, x, activation)
            assert not torch.equal(without[1], results[-1][1])
            assert torch.equal(without[0], results[-1][0])
        assert_close(results[1], results[0].double(), 2e-5 if dtype is torch.float32 else 2e-2)
