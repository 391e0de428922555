"""K-means codebooks: a matrix as indices into a few free levels, times a scale per row.

Lloyd's algorithm in one dimension on all weights divided by their rows' scales, each weighted with how much its input
matters; then the rows' scales by least squares, and again. Matrices that are served as one (queries, keys and values)
share their levels. N outputs, K inputs, L levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastserve.compress.grid import Grid, WeightScheme

_ROUNDS = 4  # of levels, then scales
_LLOYD_ROUNDS = 6
_SAMPLE = 1 << 20  # weights that are enough to place the levels


def fit(
    weights: list[Tensor],
    scheme: WeightScheme,
    scale_dtype: torch.dtype = torch.float32,
    importance: Tensor | None = None,
) -> list[Grid]:
    """One grid per matrix [N, K] of `weights`, all with the same levels.

    Args:
        importance: [K], a weight on each input's squared error, such as its mean square.
    """
    merged = torch.cat([weight.float() for weight in weights])
    importance = torch.ones(merged.shape[1]) if importance is None else importance.float()
    scales = _stored(merged.abs().amax(-1, keepdim=True), scale_dtype)
    step = max(1, merged.numel() // _SAMPLE)
    levels = _first_levels((merged / scales).flatten()[::step], scheme)
    for _ in range(_ROUNDS):
        weighting = (scales.square() * importance).flatten()[::step]
        levels = _lloyd((merged / scales).flatten()[::step], weighting, levels)
        chosen = levels[torch.bucketize(merged / scales, (levels[1:] + levels[:-1]) / 2)]
        over = (importance * merged * chosen).sum(-1, keepdim=True)
        under = (importance * chosen.square()).sum(-1, keepdim=True)
        scales = _stored(torch.where((under > 0) & (over > 0), over / under.clamp(min=1e-30), scales), scale_dtype)
    rows = [len(weight) for weight in weights]
    return [Grid(scheme, part.to(scale_dtype), codebook=levels.clone()) for part in scales.split(rows)]


def _first_levels(sample: Tensor, scheme: WeightScheme) -> Tensor:
    """Quantiles, but the ends, so that outer levels start where weights are."""
    count = scheme.max_value + 1
    return torch.quantile(sample[: 1 << 23], (torch.arange(count) + 0.5) / count)


def _lloyd(sample: Tensor, weighting: Tensor, levels: Tensor) -> Tensor:
    count = len(levels)
    for _ in range(_LLOYD_ROUNDS):
        nearest = torch.bucketize(sample, (levels[1:] + levels[:-1]) / 2)
        mass = torch.bincount(nearest, weights=weighting, minlength=count)
        sums = torch.bincount(nearest, weights=weighting * sample, minlength=count)
        levels = torch.where(mass > 0, sums / mass.clamp(min=1e-30), levels).float().sort().values
    return levels


def _stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """As they will be read back, in float32."""
    return torch.where(scales > 0, scales, 1.0).to(dtype).float()
