"""The seam between a network and its memory: a model calls `attend`, a context decides what that reads and writes.

`PagedContext` serves (keys and values live in paged caches); `VarlenContext` serves encoders, and runs whole sequences
without a cache for tests and for measuring. Models get the context as an argument; nothing is global.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from fastserve.kernels.interface import Batch, HeadTransform, Scores
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
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores, how: HeadTransform | None
    ) -> Tensor:
        """query [T, H, D], key and value [T, G, D] -> [T, H, D].

        how: what is still to be done to query and key; None: their positions are applied.
        """


class PagedContext:
    """Store the step's keys and values in the paged cache, then attend over each sequence's blocks, causally.

    Args:
        kernels: the operations.
        keys, values: per layer [num_blocks, block_size, G, D].
        batch: the step.
    """

    def __init__(self, kernels: Kernels, keys: list[Tensor], values: list[Tensor], batch: Batch) -> None:
        self.kernels = kernels
        self.longest = max(batch.context_lens, default=0)
        self._keys = keys
        self._values = values
        self.batch = batch
        self._slots = batch.tensors()[2]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores, how: HeadTransform | None
    ) -> Tensor:
        keys, values, slots = self._keys[layer], self._values[layer], self._slots
        if how is None:
            self.kernels.store_kv(key, value, keys, values, slots)
        else:
            query = self.kernels.transform_and_store(query, key, value, how, keys, values, slots)
        return self.kernels.paged_attention(query, keys, values, self.batch, scores)

    def attend_source(self, layer: int, query: Tensor, scores: Scores) -> Tensor:
        """query [T, H, D] over its sequence's whole source, which is cached -> [T, H, D]."""
        return self.kernels.paged_attention(query, self._keys[layer], self._values[layer], self.batch, scores, True)


class VarlenContext:
    """Whole sequences without a cache.

    Args:
        starts: B + 1 ints, the tokens of sequence b are starts[b] : starts[b + 1].
        is_causal: a token sees what is before it and itself; else all of its own sequence.
    """

    def __init__(self, kernels: Kernels, starts: list[int], is_causal: bool = False) -> None:
        self.kernels = kernels
        self._lengths = [end - start for start, end in pairwise(starts)]
        self.longest = max(self._lengths, default=0)
        self._starts = starts
        self._is_causal = is_causal

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores, how: HeadTransform | None
    ) -> Tensor:
        if how is not None:
            query, key = self.kernels.transform_heads(query, key, how)
        if not self._is_causal:
            return self.kernels.varlen_attention(query, key, value, self._starts, self._starts, scores)
        keys, values = (part.new_empty(len(part), 1, *part.shape[1:]) for part in (key, value))  # blocks of one token
        slots = torch.arange(len(key), device=key.device)
        self.kernels.store_kv(key, value, keys, values, slots)
        tables = [list(range(start, end)) for start, end in pairwise(self._starts)]
        batch = Batch([], [], [], self._starts, self._lengths, tables, [], device=query.device)
        return self.kernels.paged_attention(query, keys, values, batch, scores)
