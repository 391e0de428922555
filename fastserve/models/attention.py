"""The seam between a network and its memory: a model calls `attend`, a context decides what that reads and writes.

`PagedContext` serves (keys and values live in paged caches); `VarlenContext` serves encoders (whole sequences, seen in
both directions); `DenseContext` runs whole sequences without a cache, for tests and for measuring. Models get the
context as an argument; nothing is global.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

from fastserve.kernels.interface import Batch, HeadTransform
from fastserve.kernels.reference import Kernels


class AttentionContext(Protocol):
    """Attention of one step. T tokens, H query heads, G key/value heads, D head size.

    Attributes:
        kernels: what the network computes with.
        longest: tokens of the longest sequence, those of this step included.
    """

    kernels: Kernels
    longest: int

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        transform: HeadTransform | None = None,
    ) -> Tensor:
        """query [T, H, D], key and value [T, G, D] -> [T, H, D]. Causal; window in tokens.

        transform: what is still to be done to query and key; None: their positions are applied.
        """


class PagedContext:
    """Store the step's keys and values in the paged cache, then attend over each sequence's blocks.

    Args:
        kernels: the operations.
        keys, values: per layer [num_blocks, block_size, G, D].
        batch: the step.

    Attributes:
        bias: [H, 2 R + 1] float32, added to scores by distance (see `Kernels.varlen_attention`); a network may set it.
    """

    def __init__(self, kernels: Kernels, keys: list[Tensor], values: list[Tensor], batch: Batch) -> None:
        self.kernels = kernels
        self.longest = max(batch.context_lens, default=0)
        self.bias: Tensor | None = None
        self._keys = keys
        self._values = values
        self.batch = batch

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        transform: HeadTransform | None = None,
    ) -> Tensor:
        keys, values, slots = self._keys[layer], self._values[layer], self.batch.slot_mapping
        if transform is None:
            self.kernels.store_kv(key, value, keys, values, slots)
        else:
            query = self.kernels.transform_and_store(query, key, value, transform, keys, values, slots)
        return self.kernels.paged_attention(query, keys, values, self.batch, scale, window, softcap, self.bias)

    def attend_source(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """query [T, H, D] over its sequence's whole source, which is cached -> [T, H, D]."""
        return self.kernels.source_attention(query, self._keys[layer], self._values[layer], self.batch, scale)


class VarlenContext:
    """Whole sequences without a cache, each token seeing all of its own sequence.

    Args:
        starts: B + 1 ints, the tokens of sequence b are starts[b] : starts[b + 1].
        bias: [H, 2 R + 1] float32, added to scores by distance (see `Kernels.varlen_attention`).
    """

    def __init__(self, kernels: Kernels, starts: list[int], bias: Tensor | None = None) -> None:
        self.kernels = kernels
        self.longest = max((end - start for start, end in pairwise(starts)), default=0)
        self._starts = starts
        self._bias = bias

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        transform: HeadTransform | None = None,
    ) -> Tensor:
        assert not softcap
        query, key = _transformed(self.kernels, query, key, transform)
        return self.kernels.varlen_attention(query, key, value, self._starts, self._starts, scale, window, self._bias)


class DenseContext:
    """Whole sequences, no cache: `lengths` are the tokens of each, one after the other."""

    def __init__(self, kernels: Kernels, lengths: list[int]) -> None:
        self.kernels = kernels
        self.longest = max(lengths, default=0)
        self._lengths, self._starts = lengths, [*accumulate(lengths, initial=0)]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        transform: HeadTransform | None = None,
    ) -> Tensor:
        query, key = _transformed(self.kernels, query, key, transform)
        tables = [torch.arange(start, end, device=query.device) for start, end in pairwise(self._starts)]
        none = query.new_empty(0, dtype=torch.int64)
        batch = Batch(none, none, none, self._starts, self._lengths, tables, none)  # blocks of one token
        keys, values = key.unsqueeze(1), value.unsqueeze(1)
        return self.kernels.paged_attention(query, keys, values, batch, scale, window, softcap)


def _transformed(
    kernels: Kernels, query: Tensor, key: Tensor, transform: HeadTransform | None
) -> tuple[Tensor, Tensor]:
    if transform is None:
        return query, key
    return (
        kernels.transform_heads(query, transform.query_norm, transform),
        kernels.transform_heads(key, transform.key_norm, transform),
    )
