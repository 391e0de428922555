"""Drawing tokens: the native kernels give the reference's token, always; the reference against plain definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastserve.kernels.interface import RowSampling
from fastserve.kernels.reference import Kernels
from tests.kernels.conftest import native_kernels

REFERENCE = Kernels()
INF = math.inf


def rows_of(count: int, seed: int) -> list[RowSampling]:
    """Every kind of option, and random numbers from end to end of their range."""
    generator = torch.Generator().manual_seed(seed)
    options = list(
        itertools.product((1.0, 1 / 0.7, 0.25, 30.0), (0, 1, 3, 50, 5000), (1.0, 0.9, 0.3, 1e-6), (0.0, 0.05, 1.0))
    )
    randoms = [0, (1 << 53) - 1, *torch.randint(0, 1 << 53, (max(0, count - 2),), generator=generator).tolist()]
    picks = torch.randint(0, len(options), (count,), generator=generator).tolist()
    return [RowSampling(*options[pick], random) for pick, random in zip(picks, randoms, strict=False)]


def kinds_of_logits(size: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    plain = 3 * torch.randn(size, generator=generator)
    masked = plain.clone()
    masked[torch.rand(size, generator=generator) < 0.7] = -INF
    ties = torch.randint(-2, 3, (size,), generator=generator).float()  # zeros of both signs, whole groups of equals
    ties[ties == 0] = torch.tensor([0.0, -0.0])[torch.arange(int((ties == 0).sum())) % 2]
    return [plain, masked, ties, plain * 30, plain * 1e-3, torch.full((size,), -4.0), plain + 1e4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["x32", "x16"])
@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 1000, 20011])
def test_same_token_as_the_reference(isa: str, size: int, dtype: torch.dtype) -> None:
    kernels = native_kernels(isa)
    each = 4 if size > 10000 else 12
    logits = torch.stack([row for row in kinds_of_logits(size, size) for _ in range(each)]).to(dtype)
    rows = rows_of(len(logits), size)
    assert kernels.sample(logits, rows) == REFERENCE.sample(logits, rows)


def test_what_cannot_be_drawn_gives_the_first_of_the_best(isa: str) -> None:
    nan, how = math.nan, RowSampling(1.0, 0, 0.9, 0.0, 1 << 52)
    logits = torch.tensor([[-INF] * 4, [nan] * 4, [1, INF, INF, 2], [nan, 5, -INF, nan], [nan, -INF, 3, 3]])
    rows = [how] * 4 + [RowSampling(0.0, 0, 1.0, 0.0, 0)]
    for kernels in (REFERENCE, native_kernels(isa)):
        assert kernels.sample(logits, rows) == [0, 0, 1, 1, 2]


def test_rows_and_counts_that_are_not_there(isa: str) -> None:
    kernels, logits = native_kernels(isa), torch.zeros(2, 5)
    for count in (1, 3):
        with pytest.raises(ValueError, match="one RowSampling for each row"):
            kernels.sample(logits, rows_of(count, 0))
    for count in (0, 6):
        with pytest.raises(ValueError, match="count must be from 1"):
            kernels.most_probable(logits, count)


def test_rows_of_a_strided_matrix_in_any_company(isa: str) -> None:
    kernels = native_kernels(isa, 3)
    wide = torch.randn(9, 700, generator=torch.Generator().manual_seed(1))
    logits, rows = wide[:, 30:655], rows_of(9, 4)
    together = kernels.sample(logits, rows)
    assert together == [kernels.sample(logits[i : i + 1], rows[i : i + 1])[0] for i in range(9)]
    assert together == REFERENCE.sample(logits, rows)


def kept(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    """The tokens that some random number draws."""
    randoms = [step * ((1 << 53) - 1) // 2000 for step in range(2001)]
    rows = [RowSampling(1.0, top_k, top_p, min_p, random) for random in randoms]
    return set(REFERENCE.sample(logits.expand(len(rows), -1), rows))


def test_filters_keep_what_their_definitions_say() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    assert kept(logits) == {0, 1, 2, 3}
    assert kept(logits, top_k=2) == {1, 3}
    assert kept(logits, top_p=0.65) == {1, 3}
    assert kept(logits, top_p=0.75) == {1, 2, 3}
    assert kept(logits, top_k=3, top_p=0.45) == {1, 3}  # of 0.9 that top-k leaves, 0.405 is wanted
    assert kept(logits, top_k=3, top_p=0.44) == {1}
    assert kept(logits, min_p=0.6) == {1, 3}
    assert kept(torch.zeros(5), top_k=2) == {0, 1, 2, 3, 4}  # equals stand or fall together


@pytest.mark.parametrize("size", [10, 1000])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9])
def test_top_p_keeps_the_fewest_that_reach_p(size: int, top_p: float) -> None:
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size))
    ordered, ids = torch.softmax(logits.double(), -1).sort(descending=True)
    expected = ids[: int((ordered.cumsum(0) < top_p).sum()) + 1].tolist()
    drawn = kept(logits, top_p=top_p)
    assert drawn <= set(expected)
    assert size > 10 or drawn == set(expected)


def test_draws_follow_the_softmax_at_the_temperature(isa: str) -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0])
    steps = 10000
    rows = [RowSampling(1 / 0.7, 0, 1.0, 0.0, (2 * i + 1) * (1 << 53) // (2 * steps)) for i in range(steps)]
    drawn = torch.tensor(native_kernels(isa).sample(logits.expand(steps, -1), rows))
    shares = torch.bincount(drawn, minlength=4) / steps
    assert torch.allclose(shares, torch.softmax(logits / 0.7, -1), atol=2e-4)


def test_the_most_probable_are_the_reference_s(isa: str) -> None:
    """Equals, what is masked, and rows of which hardly anything is left."""
    kernels = native_kernels(isa)
    for size, count in ((8, 8), (100, 4), (1000, 1), (30001, 12)):
        x = torch.stack(kinds_of_logits(size, seed=size))
        x[-1, 2:] = -INF
        x = torch.cat((x, x[:2]))
        x[-1] = -INF
        x[-2, size // 2] = INF
        sums, values, ids = kernels.most_probable(x, count)
        expected_sums, expected_values, _ = REFERENCE.most_probable(x, count)
        torch.testing.assert_close(sums, expected_sums, rtol=1e-6, atol=1e-5)
        assert torch.equal(values, expected_values)
        for row, found, places, last in zip(x, values, ids, values.isfinite().sum(1).tolist(), strict=True):
            assert torch.equal(row[places[:last]], found[:last]) and len(places[:last].unique()) == last
