"""From the hidden states of a ragged batch to one vector per sequence.

Legend: T tokens of all sequences, one after the other; B sequences; `starts` are B + 1 ints, the tokens of sequence b
are starts[b] : starts[b + 1], at least one.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def _per_sequence(reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor, list[int]], Tensor]:
    return lambda hidden, starts: torch.stack([reduce(hidden[start:end].float()) for start, end in pairwise(starts)])


def _weighted_mean(rows: Tensor) -> Tensor:
    """Later tokens count more: weights 1, 2, 3, ... (Muennighoff, 2022)."""
    weights = torch.arange(1, len(rows) + 1, device=rows.device).float()
    return weights @ rows / weights.sum()


# Name, as sentence-transformers has it -> hidden [T, K], starts -> [B, K] float32.
POOLS: dict[str, Callable[[Tensor, list[int]], Tensor]] = {
    "cls": lambda hidden, starts: hidden[starts[:-1]].float(),
    "lasttoken": lambda hidden, starts: hidden[[end - 1 for end in starts[1:]]].float(),
    "mean": _per_sequence(lambda rows: rows.mean(0)),
    "max": _per_sequence(lambda rows: rows.amax(0)),
    "mean_sqrt_len_tokens": _per_sequence(lambda rows: rows.sum(0) / len(rows) ** 0.5),
    "weightedmean": _per_sequence(_weighted_mean),
}
