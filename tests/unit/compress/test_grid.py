"""Grids and the methods that choose values on them, on plain matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastserve.compress import codebook, gptq
from fastserve.compress.activations import InputStatistics
from fastserve.compress.grid import Grid, WeightScheme, fit, nearest
from fastserve.core.errors import ConfigError

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(48, 64, generator=GENERATOR) * torch.rand(48, 1, generator=GENERATOR)
SCHEMES = [
    WeightScheme(bits, group, symmetric)
    for bits in (2, 3, 4, 6, 8)
    for group in (-1, 0, 32)
    for symmetric in (True, False)
] + [WeightScheme(8, 0, kind="float")]


def inputs(rows: int = 512, size: int = 64) -> Tensor:
    """Features that depend on each other and differ in size, as those of a network do."""
    base = torch.randn(rows, size, generator=GENERATOR)
    mixed = base @ torch.randn(size, size, generator=GENERATOR) / 8 + base
    return mixed * torch.logspace(-1, 0.5, size)[torch.randperm(size, generator=torch.Generator().manual_seed(1))]


def make(weight: Tensor, scheme: WeightScheme, **options: object) -> Grid:
    if scheme.kind == "codebook":
        return codebook.fit([weight], scheme)[0]
    return fit(weight, scheme, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rounding_is_to_the_nearest_value(scheme: WeightScheme) -> None:
    grid = make(WEIGHT, scheme)
    found = nearest(WEIGHT, grid)
    if scheme.kind == "float":
        assert ((found.dequantize() - WEIGHT).abs() <= WEIGHT.abs() / 16 + 1e-4).all()
        return
    scales, zeros = grid.rows(64)
    every = torch.stack(
        [grid.levels(torch.full_like(WEIGHT, value), scales, zeros) for value in range(1 << scheme.bits)]
    )
    best = (every - WEIGHT).abs().amin(0)
    assert torch.allclose((found.dequantize() - WEIGHT).abs(), best, atol=1e-6)
    assert best.max() <= 0.51 * scales.max()  # nothing is cut off: the range holds every weight
    assert found.values.max() <= scheme.max_value


@pytest.mark.parametrize("symmetric", [True, False])
def test_searched_ranges_lose_less(symmetric: bool) -> None:
    scheme = WeightScheme(3, 32, symmetric)
    importance = inputs().square().mean(0)

    def loss(is_searched: bool) -> float:
        change = (
            nearest(WEIGHT, fit(WEIGHT, scheme, importance=importance, is_searched=is_searched)).dequantize() - WEIGHT
        )
        return float((change.square() * importance).sum())

    assert loss(True) < 0.9 * loss(False)


@pytest.mark.parametrize(
    "scheme",
    [
        WeightScheme(4, 32),
        WeightScheme(3, 0, False),
        WeightScheme(3, 0, kind="codebook"),
        WeightScheme(8, 0, kind="float"),
    ],
    ids=str,
)
def test_gptq_changes_outputs_less_than_rounding(scheme: WeightScheme) -> None:
    x = inputs()
    moments = x.t() @ x / len(x)
    grid = make(WEIGHT, scheme)
    losses = [
        float((x @ (found.dequantize() - WEIGHT).t()).square().mean())
        for found in (gptq.quantize(WEIGHT, moments, grid), nearest(WEIGHT, grid))
    ]
    assert losses[0] < 0.8 * losses[1]


def test_gptq_of_one_column_is_rounding_and_dead_inputs_do_no_harm() -> None:
    x = inputs()
    x[:, 5] = 0
    found = gptq.quantize(WEIGHT, x.t() @ x, fit(WEIGHT, WeightScheme(4, 0)))
    assert torch.isfinite(found.dequantize()).all()
    single = WEIGHT[:, :1]
    grid = fit(single, WeightScheme(2, 0))
    assert torch.equal(gptq.quantize(single, torch.ones(1, 1), grid).values, nearest(single, grid).values)


@pytest.mark.parametrize("bits", [3, 4])
def test_codebooks_are_better_than_uniform_values(bits: int) -> None:
    weight = torch.randn(64, 256, generator=GENERATOR) ** 3
    levels = nearest(weight, codebook.fit([weight], WeightScheme(bits, 0, kind="codebook"))[0])
    uniform = nearest(weight, fit(weight, WeightScheme(bits, 0)))
    assert (levels.dequantize() - weight).square().sum() < 0.7 * (uniform.dequantize() - weight).square().sum()


def test_codebooks_of_one_matrix_in_parts_are_one() -> None:
    parts = codebook.fit([WEIGHT[:16], WEIGHT[16:]], WeightScheme(4, 0, kind="codebook"))
    whole = codebook.fit([WEIGHT], WeightScheme(4, 0, kind="codebook"))[0]
    assert all(torch.equal(part.codebook, whole.codebook) for part in parts if part.codebook is not None)
    assert torch.equal(torch.cat([part.scales for part in parts]), whole.scales)


@pytest.mark.parametrize("scheme", [WeightScheme(4, 32), WeightScheme(2, 0, False)], ids=str)
def test_zeros_stay_zeros(scheme: WeightScheme) -> None:
    weight = WEIGHT.clone()
    weight[3] = 0
    assert not nearest(weight, fit(weight, scheme, is_searched=True)).dequantize()[3].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "9 bits"),
        ({"bits": 5, "group_size": 0, "kind": "codebook"}, "codebook weights of 5"),
        ({"bits": 4, "kind": "codebook"}, "group_size = 0"),
        ({"group_size": -2}, "group_size is -2"),
    ],
)
def test_what_is_no_grid(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WeightScheme(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse", "entropy"])
def test_static_ranges(observer: str) -> None:
    """Bulk of spread 1 and one value of 30: only minmax keeps that, the others serve the bulk."""
    statistics = InputStatistics(16, has_ranges=True)
    x = torch.randn(40000, 16, generator=GENERATOR)
    x[7, 3] = 30.0
    statistics.add(x)
    scale = statistics.static_scale(observer)
    assert scale * 127 == pytest.approx(30.0) if observer == "minmax" else 3.0 < scale * 127 < 9.0
    statistics = InputStatistics(4, has_ranges=True)
    statistics.add(torch.zeros(3, 4))
    assert statistics.static_scale(observer) > 0
