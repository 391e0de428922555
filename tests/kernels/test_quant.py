"""Quantised forms: errors bounded by half a step, exact round trips, clear refusals."""

from __future__ import annotations

import pytest
import torch

from fastserve.bench.rounding import quantize
from fastserve.checkpoint.quantized import QuantScheme, pack_words, unpack_words
from fastserve.core.errors import ConfigError
from fastserve.kernels.quant import quantize_activations

WEIGHT = torch.randn(24, 200, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_error_is_at_most_half_a_step(bits: int, is_symmetric: bool) -> None:
    scheme = QuantScheme(bits, 64 if bits == 4 else 0, is_symmetric)
    quantized = quantize(WEIGHT, scheme)
    step = quantized.scales.repeat_interleave(64 if bits == 4 else 200, dim=1)[:, :200]
    # A rounded zero point may cost the extreme value another half step.
    assert ((quantized.dequantize() - WEIGHT).abs() <= step * (0.501 if is_symmetric else 1.001)).all()


def test_codebook_is_nearer_than_uniform_levels() -> None:
    codebook = quantize(WEIGHT, QuantScheme(4, has_codebook=True))
    uniform = quantize(WEIGHT, QuantScheme(4))
    errors = [float((quantized.dequantize() - WEIGHT).square().mean()) for quantized in (codebook, uniform)]
    assert errors[0] < 0.9 * errors[1]


def test_zero_rows_stay_zero() -> None:
    for scheme in (QuantScheme(8), QuantScheme(4, 32, is_symmetric=False), QuantScheme(4, has_codebook=True)):
        weight = WEIGHT.clone()
        weight[3] = 0
        row = quantize(weight, scheme).dequantize()[3]
        limit = 0.2 if scheme.has_codebook else 0.0  # a codebook has no exact zero
        assert row.abs().max() <= limit
    values, scales = quantize_activations(torch.zeros(2, 8))
    assert not values.any() and torch.equal(scales, torch.ones(2, 1))


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_round_trip_in_compressed_tensors_order(bits: int) -> None:
    values = torch.randint(0, 1 << bits, (5, 21), dtype=torch.uint8)
    words = pack_words(values, bits)
    assert words.shape == (5, -(-21 * bits // 32)) and words.dtype is torch.int32
    row = sum((int(word) % (1 << 32)) << (32 * place) for place, word in enumerate(words[1]))  # one stream of bits
    assert [row >> (bits * place) & ((1 << bits) - 1) for place in range(21)] == values[1].tolist()
    assert torch.equal(unpack_words(words, bits, 21), values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 3}, "weight_bits is 3"),
        ({"weight_bits": 4, "group_size": 48}, "group_size is 48"),
        ({"weight_bits": 8, "group_size": 64}, "group_size is 64"),
        ({"activation_bits": 4}, "activation_bits is 4"),
        ({"weight_bits": 4, "has_codebook": True, "activation_bits": 8}, "codebook"),
    ],
)
def test_unknown_schemes_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantScheme(**options)  # type: ignore[arg-type]
