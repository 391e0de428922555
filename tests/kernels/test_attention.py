"""Paged attention of every instruction set against float64; chunks, batches and threads change no bit.

int8 caches are compared with float64 over the values that the bytes stand for: what is left is the arithmetic's error.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastserve.kernels.cpu import CPUKernels
from fastserve.kernels.interface import Batch, Scores
from fastserve.kernels.quant import int8_kv_views, quantize_kv
from fastserve.kernels.reference import Kernels
from tests.kernels.conftest import native_kernels

HEADS = [(2, 2, 64), (4, 1, 128), (6, 2, 80), (3, 3, 16), (4, 2, 36)]  # H, G, D
BLOCK_SIZE = 16
REFERENCE = Kernels()


class Sequence:
    """Keys, values and queries of one sequence, and the paged cache blocks that hold them."""

    def __init__(self, length: int, heads: tuple[int, int, int], dtype: torch.dtype, seed: int) -> None:
        num_heads, num_kv_heads, size = heads
        generator = torch.Generator().manual_seed(seed)
        self.length = length
        self.query = torch.randn(length, num_heads, size, generator=generator).to(dtype)
        self.key = torch.randn(length, num_kv_heads, size, generator=generator).to(dtype)
        self.value = torch.randn(length, num_kv_heads, size, generator=generator).to(dtype)


class Cache:
    """A paged cache whose blocks are handed out in a scrambled order."""

    def __init__(self, sequences: list[Sequence], dtype: torch.dtype, block_size: int = BLOCK_SIZE) -> None:
        self.block_size = block_size
        needed = [-(-sequence.length // block_size) for sequence in sequences]
        order = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(9))
        self.tables = list(order[: sum(needed)].split(needed))
        shape = (sum(needed) + 3, block_size, *sequences[0].key.shape[1:])
        if dtype is torch.int8:
            self.keys = torch.full((*shape[:3], shape[3] + 4), 111, dtype=dtype)
            self.values = self.keys.clone()
            for cache in (self.keys, self.values):
                int8_kv_views(cache)[1].fill_(math.nan)
            return
        # What no token has written must not be read: a NaN would show.
        self.keys = torch.full(shape, math.nan, dtype=dtype)
        self.values = torch.full(shape, math.nan, dtype=dtype)

    def slots(self, index: int, start: int, end: int) -> Tensor:
        positions = torch.arange(start, end)
        return self.tables[index][positions // self.block_size] * self.block_size + positions % self.block_size


def attend(
    kernels: Kernels,
    cache: Cache,
    sequences: list[Sequence],
    ranges: list[tuple[int, int, int]],
    window: int = 0,
    softcap: float = 0.0,
) -> list[Tensor]:
    """One step: tokens start..end of sequence i for each (i, start, end); their keys and values are stored first."""
    starts = [0]
    for _, start, end in ranges:
        starts.append(starts[-1] + end - start)
    query = torch.cat([sequences[i].query[start:end] for i, start, end in ranges])
    key = torch.cat([sequences[i].key[start:end] for i, start, end in ranges])
    value = torch.cat([sequences[i].value[start:end] for i, start, end in ranges])
    slots = torch.cat([cache.slots(i, start, end) for i, start, end in ranges])
    batch = Batch(
        input_ids=[],
        positions=[],
        slot_mapping=slots.tolist(),
        query_starts=starts,
        context_lens=[end for _, _, end in ranges],
        block_tables=[cache.tables[i].tolist() for i, _, _ in ranges],
        logit_rows=[],
    )
    kernels.store_kv(key, value, cache.keys, cache.values, slots)
    scores = Scores(query.shape[-1] ** -0.5, window, softcap)
    result = kernels.paged_attention(query, cache.keys, cache.values, batch, scores)
    return list(result.split([end - start for _, start, end in ranges]))


def exact(sequence: Sequence, window: int, softcap: float) -> Tensor:
    query, key, value = sequence.query.double(), sequence.key.double(), sequence.value.double()
    group = query.shape[1] // key.shape[1]
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(group, 1)) * query.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    positions = torch.arange(sequence.length)
    seen = positions[None, :] <= positions[:, None]
    if window:
        seen &= positions[None, :] > positions[:, None] - window
    probs = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probs, value.repeat_interleave(group, 1))


def whole(kernels: CPUKernels, sequence: Sequence, dtype: torch.dtype, window: int = 0, softcap: float = 0.0) -> Tensor:
    return attend(kernels, Cache([sequence], dtype), [sequence], [(0, 0, sequence.length)], window, softcap)[0]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (50, 0.0), (0, 20.0), (130, 5.0), (1, 0.0)])
def test_whole_sequences_against_float64(isa: str, heads: tuple[int, int, int], window: int, softcap: float) -> None:
    kernels = native_kernels(isa)
    for dtype, tolerance in ((torch.float32, 8e-6), (torch.bfloat16, 1.5e-2)):
        for length in (1, 17, 64, 200) if isa != "plain" else (1, 17, 100):
            sequence = Sequence(length, heads, dtype, length)
            result = whole(kernels, sequence, dtype, window, softcap)
            error = float((result.double() - exact(sequence, window, softcap)).abs().max())
            assert error < tolerance, (dtype, length, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["x32", "x16"])
@pytest.mark.parametrize("window", [0, 70])
def test_chunks_do_not_change_a_bit(isa: str, dtype: torch.dtype, window: int) -> None:
    kernels = native_kernels(isa)
    length = 700 if isa != "plain" else 150  # beyond one split of 512
    sequence = Sequence(length, (4, 2, 64), dtype, 5)
    expected = whole(kernels, sequence, dtype, window)
    for chunk in (1, 3, 16, 97, 256):
        cache = Cache([sequence], dtype)
        first = 0 if chunk > 3 else length - 40  # single steps at the end only
        parts = attend(kernels, cache, [sequence], [(0, 0, first)], window) if first else []
        for start in range(first, length, chunk):
            parts += attend(kernels, cache, [sequence], [(0, start, min(length, start + chunk))], window)
        assert torch.equal(torch.cat(parts), expected), chunk


def test_batch_and_threads_do_not_change_a_bit(isa: str) -> None:
    lengths = [5, 700, 64, 130] if isa != "plain" else [5, 140, 64]
    sequences = [Sequence(length, (4, 2, 64), torch.bfloat16, length) for length in lengths]
    for count in (1, 2, 3):
        kernels = native_kernels(isa, count)
        alone = [whole(native_kernels(isa, 1), sequence, torch.bfloat16) for sequence in sequences]
        cache = Cache(sequences, torch.bfloat16)
        together = attend(kernels, cache, sequences, [(i, 0, sequence.length) for i, sequence in enumerate(sequences)])
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one, other)
        # A decode step of all of them over the same cache.
        last = attend(kernels, cache, sequences, [(i, s.length - 1, s.length) for i, s in enumerate(sequences)])
        for one, other in zip(alone, last, strict=True):
            assert torch.equal(one[-1:], other)


@pytest.mark.parametrize(
    "cache_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=["cache32", "cache16", "cache8"]
)
@pytest.mark.parametrize("heads", [(4, 2, 64), (2, 2, 36)], ids=str)
def test_a_nan_is_seen_by_those_who_see_its_key(
    isa: str, cache_dtype: torch.dtype, heads: tuple[int, int, int]
) -> None:
    kernels, length, place = native_kernels(isa), 150, 70
    for dtype, window, softcap in ((torch.float32, 0, 0.0), (torch.bfloat16, 30, 0.0), (torch.bfloat16, 0, 5.0)):
        sequence = Sequence(length, heads, dtype, 2)
        expected = whole(kernels, sequence, cache_dtype, window, softcap)
        sequence.key[place, 1, 3] = math.nan
        expected[place : place + window if window else length, heads[0] // 2 :] = math.nan
        result = whole(kernels, sequence, cache_dtype, window, softcap)
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
        starts = [0, length]
        query, key, value = sequence.query, sequence.key, sequence.value
        result = kernels.varlen_attention(query, key, value, starts, starts, Scores(heads[2] ** -0.5, window))
        seen = torch.zeros(length, heads[0], dtype=torch.bool)
        seen[max(0, place - window + 1) if window else 0 : place + window if window else length, heads[0] // 2 :] = True
        assert torch.equal(result.isnan(), seen.unsqueeze(-1).expand(result.shape))


def test_sequences_without_queries(isa: str) -> None:
    kernels, sequences = native_kernels(isa), [Sequence(20, (4, 2, 64), torch.float32, seed) for seed in range(3)]
    cache = Cache(sequences, torch.float32)
    first = attend(kernels, cache, sequences, [(0, 0, 20), (1, 0, 20), (2, 0, 20)])
    again = attend(kernels, cache, sequences, [(0, 19, 20), (1, 20, 20), (2, 18, 20)])
    assert [len(part) for part in again] == [1, 0, 2]
    assert all(torch.equal(part, whole[20 - len(part) :]) for part, whole in zip(again, first, strict=True))
    none = kernels.varlen_attention(*(torch.zeros(1, 2, 16) for _ in range(3)), [0], [0], Scores(1.0))
    assert none.shape == (1, 2, 16)


def test_float32_queries_over_a_bfloat16_cache(isa: str) -> None:
    kernels = native_kernels(isa)
    sequence = Sequence(40, (4, 2, 64), torch.float32, 3)
    for tensor in (sequence.key, sequence.value):
        tensor.copy_(tensor.bfloat16().float())
    result = attend(kernels, Cache([sequence], torch.bfloat16), [sequence], [(0, 0, 40)])[0]
    assert float((result.double() - exact(sequence, 0, 0.0)).abs().max()) < 3e-6


@pytest.mark.parametrize("block_size", [1, 8, 24, 32, 128])
@pytest.mark.parametrize(
    "cache_dtype", [torch.float32, torch.bfloat16, torch.int8], ids=["cache32", "cache16", "cache8"]
)
def test_no_block_size_changes_a_bit(isa: str, block_size: int, cache_dtype: torch.dtype) -> None:
    kernels = native_kernels(isa)
    for size, dtype in ((64, torch.bfloat16), (36, torch.float32)):
        sequence = Sequence(150, (4, 2, size), dtype, 4)
        ranges = [[(0, 0, 90)], [(0, 90, 149)], [(0, 149, 150)]]
        results = []
        for tokens in (BLOCK_SIZE, block_size):
            cache = Cache([sequence], cache_dtype, tokens)
            results.append(torch.cat([attend(kernels, cache, [sequence], part)[0] for part in ranges]))
        assert torch.equal(*results), (size, dtype)


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8], ids=["cache16", "cache8"])
def test_heads_whose_elements_fill_no_word(isa: str, cache_dtype: torch.dtype) -> None:
    sequence = Sequence(40, (4, 2, 35), torch.float32, 6)
    for tensor in (sequence.key, sequence.value):
        tensor.copy_(tensor.bfloat16().float())
    expected = exact(sequence if cache_dtype is torch.bfloat16 else rounded(sequence), 0, 0.0)
    for block_size in (BLOCK_SIZE, 12):
        result = attend(native_kernels(isa), Cache([sequence], cache_dtype, block_size), [sequence], [(0, 0, 40)])[0]
        assert float((result.double() - expected).abs().max()) < 5e-6


def rounded(sequence: Sequence) -> Sequence:
    """The same sequence with the keys and values that an int8 cache holds of it."""
    other = Sequence(sequence.length, (*sequence.query.shape[1:2], *sequence.key.shape[1:]), torch.float32, 0)
    other.query = sequence.query
    for name in ("key", "value"):
        values, scales = quantize_kv(getattr(sequence, name))
        setattr(other, name, values.double() * scales.double().unsqueeze(-1))
    return other


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (50, 20.0)])
def test_int8_cache_against_float64(isa: str, heads: tuple[int, int, int], window: int, softcap: float) -> None:
    kernels = native_kernels(isa)
    for dtype, tolerance in ((torch.float32, 8e-6), (torch.bfloat16, 1.5e-2)):
        for length in (1, 17, 200) if isa != "plain" else (1, 100):
            sequence = Sequence(length, heads, dtype, length)
            cache = Cache([sequence], torch.int8)
            result = attend(kernels, cache, [sequence], [(0, 0, length)], window, softcap)[0]
            expected = exact(rounded(sequence), window, softcap)
            assert float((result.double() - expected).abs().max()) < tolerance, (dtype, length)
            cache = Cache([sequence], torch.int8)
            reference = attend(REFERENCE, cache, [sequence], [(0, 0, length)], window, softcap)[0]
            # The reference rounds what the bytes stand for to the query's type.
            assert float((reference.double() - expected).abs().max()) < 2 * tolerance, (dtype, length)


def test_int8_cache_is_near_the_exact_one(isa: str) -> None:
    """What eight bits cost: unit normals, each wrong by 1/254 of the largest of its head at most."""
    sequence = Sequence(100, (4, 2, 64), torch.float32, 8)
    result = whole(native_kernels(isa), sequence, torch.int8)
    assert float((result.double() - exact(sequence, 0, 0.0)).abs().max()) < 2.5e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["x32", "x16"])
def test_int8_cache_chunks_batches_and_threads_do_not_change_a_bit(isa: str, dtype: torch.dtype) -> None:
    lengths = [7, 620, 70] if isa != "plain" else [7, 90]
    sequences = [Sequence(length, (4, 2, 64), dtype, length) for length in lengths]
    expected = [whole(native_kernels(isa, 1), sequence, torch.int8) for sequence in sequences]
    for count in (1, 3):
        kernels, cache = native_kernels(isa, count), Cache(sequences, torch.int8)
        for chunk in (97, 16):
            parts: list[list[Tensor]] = [[] for _ in sequences]
            for start in range(0, max(lengths), chunk):
                ranges = [(i, start, min(n, start + chunk)) for i, n in enumerate(lengths) if start < n]
                for (i, _, _), part in zip(ranges, attend(kernels, cache, sequences, ranges), strict=True):
                    parts[i].append(part)
            assert all(torch.equal(torch.cat(part), whole) for part, whole in zip(parts, expected, strict=True))
        last = attend(kernels, cache, sequences, [(i, n - 1, n) for i, n in enumerate(lengths)])
        assert all(torch.equal(part, whole[-1:]) for part, whole in zip(last, expected, strict=True))


def bidirectional(query: Tensor, key: Tensor, value: Tensor, window: int, bias: Tensor | None) -> Tensor:
    """One sequence in float64: the last query stands where the last key does."""
    group, (num_queries, num_keys) = query.shape[1] // key.shape[1], (len(query), len(key))
    scores = torch.einsum("qhd,khd->hqk", query.double(), key.double().repeat_interleave(group, 1))
    scores *= query.shape[-1] ** -0.5
    distances = torch.arange(num_keys) - torch.arange(num_keys - num_queries, num_keys)[:, None]
    if bias is not None:
        scores = scores + bias.double()[:, distances + bias.shape[1] // 2]
    if window:
        scores = scores.masked_fill(distances.abs() >= window, -math.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.double().repeat_interleave(group, 1))


@pytest.mark.parametrize("heads", [(4, 2, 64), (3, 3, 36)], ids=str)
@pytest.mark.parametrize("window", [0, 1, 9, 100])
@pytest.mark.parametrize("has_bias", [False, True])
def test_bidirectional_attention_of_ragged_sequences(
    isa: str, heads: tuple[int, int, int], window: int, has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(window)
    lengths = [1, 30, 64, 131] if isa != "plain" else [1, 30, 66]
    bias = torch.randn(heads[0], 2 * 140 + 1, generator=generator) if has_bias else None
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    scores = Scores(heads[2] ** -0.5, window, bias=bias)
    for dtype, tolerance in ((torch.float32, 8e-6), (torch.bfloat16, 2e-2)):
        merged = torch.randn(starts[-1], heads[0] + 2 * heads[1], heads[2], generator=generator).to(dtype)
        query, key, value = merged.split([heads[0], heads[1], heads[1]], dim=1)
        for kernels in (native_kernels(isa, 1), native_kernels(isa, 3), REFERENCE):
            result = kernels.varlen_attention(query, key, value, starts, starts, scores)
            for start, end in zip(starts, starts[1:], strict=False):
                part = bidirectional(query[start:end], key[start:end], value[start:end], window, bias)
                assert float((result[start:end].double() - part).abs().max()) < tolerance, (dtype, kernels.name)


def test_cross_attention_over_other_lengths(isa: str) -> None:
    """Queries of a decoder over an encoder's keys: fewer, more, and one sequence without keys."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3 + 50 + 2, 4, 32, generator=generator)
    key, value = torch.randn(2, 40 + 7, 2, 32, generator=generator)
    query_starts, key_starts = [0, 3, 53, 55], [0, 40, 47, 47]
    result = native_kernels(isa).varlen_attention(query, key, value, query_starts, key_starts, Scores(32**-0.5))
    reference = REFERENCE.varlen_attention(query[:53], key, value, query_starts[:3], key_starts[:3], Scores(32**-0.5))
    assert float((result[:53] - reference).abs().max()) < 3e-6
    assert torch.equal(result[53:], torch.zeros(2, 4, 32))
