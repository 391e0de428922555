"""Paged attention of every instruction set against float64; chunks, batches and threads change no bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastserve.kernels.cpu import CPUKernels
from fastserve.kernels.interface import Batch
from tests.kernels.conftest import native_kernels

HEADS = [(2, 2, 64), (4, 1, 128), (6, 2, 80), (3, 3, 16), (4, 2, 36)]  # H, G, D
BLOCK_SIZE = 16


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

    def __init__(self, sequences: list[Sequence], dtype: torch.dtype) -> None:
        needed = [-(-sequence.length // BLOCK_SIZE) for sequence in sequences]
        order = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(9))
        self.tables = list(order[: sum(needed)].split(needed))
        shape = (sum(needed) + 3, BLOCK_SIZE, *sequences[0].key.shape[1:])
        # What no token has written must not be read: a NaN would show.
        self.keys = torch.full(shape, math.nan, dtype=dtype)
        self.values = torch.full(shape, math.nan, dtype=dtype)

    def slots(self, index: int, start: int, end: int) -> Tensor:
        positions = torch.arange(start, end)
        return self.tables[index][positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE


def attend(
    kernels: CPUKernels,
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
    nothing = torch.empty(0, dtype=torch.int64)
    batch = Batch(
        input_ids=nothing,
        positions=nothing,
        slot_mapping=torch.cat([cache.slots(i, start, end) for i, start, end in ranges]),
        query_starts=starts,
        context_lens=[end for _, _, end in ranges],
        block_tables=[cache.tables[i] for i, _, _ in ranges],
        logit_rows=nothing,
    )
    kernels.store_kv(key, value, cache.keys, cache.values, batch.slot_mapping)
    scale = query.shape[-1] ** -0.5
    result = kernels.paged_attention(query, cache.keys, cache.values, batch, scale, window, softcap)
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


def test_float32_queries_over_a_bfloat16_cache(isa: str) -> None:
    kernels = native_kernels(isa)
    sequence = Sequence(40, (4, 2, 64), torch.float32, 3)
    for tensor in (sequence.key, sequence.value):
        tensor.copy_(tensor.bfloat16().float())
    result = attend(kernels, Cache([sequence], torch.bfloat16), [sequence], [(0, 0, 40)])[0]
    assert float((result.double() - exact(sequence, 0, 0.0)).abs().max()) < 3e-6


def test_keys_and_values_that_are_slices_of_one_tensor(isa: str) -> None:
    """What `DenseContext` gives: one block as long as the sequence, strided heads."""
    kernels = native_kernels(isa)
    merged = torch.randn(30, 8, 32, generator=torch.Generator().manual_seed(2))
    query, key, value = merged[:, :4], merged[:, 4:6], merged[:, 6:]
    nothing = torch.empty(0, dtype=torch.int64)
    batch = Batch(nothing, nothing, nothing, [0, 30], [30], [torch.zeros(1, dtype=torch.int64)], nothing)
    result = kernels.paged_attention(query, key[None], value[None], batch, 32**-0.5, 0, 0.0)
    sequence = Sequence(30, (4, 2, 32), torch.float32, 0)
    sequence.query, sequence.key, sequence.value = query, key, value
    assert float((result.double() - exact(sequence, 0, 0.0)).abs().max()) < 3e-6
