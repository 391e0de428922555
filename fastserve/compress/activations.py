"""What goes into the linear layers of a block: second moments, largest values, and which layers read the same tensor.

The moments are all that GPTQ, AWQ and the rest need: the squared error of a changed weight's outputs is tr(E M E^T).
Ranges for static 8-bit activations come from a histogram of magnitudes. K input features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastserve.compress.walk import Visit

_BINS_PER_OCTAVE, _LOWEST_OCTAVE, _NUM_OCTAVES = 32, -24, 48  # magnitudes from 2^-24 to 2^24
_PERCENTILE = 0.9999
_LEVELS = 127


class InputStatistics:
    """Sums over all inputs of one or more layers that read the same tensor.

    Attributes:
        moments: [K, K], the mean of x x^T.
        top: [K], the largest magnitude of each feature.

    Args:
        has_ranges: count single values too, for `static_scale`; takes longer than the sums.
    """

    def __init__(self, num_inputs: int, has_ranges: bool = False) -> None:
        self._sum = torch.zeros(num_inputs, num_inputs)
        self._count = 0
        self.top = torch.zeros(num_inputs)
        self._histogram = torch.zeros(_BINS_PER_OCTAVE * _NUM_OCTAVES) if has_ranges else None

    def add(self, x: Tensor) -> None:
        """x [..., K]."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self._sum.addmm_(rows.t(), rows)
        self._count += len(rows)
        low, high = rows.aminmax(dim=0)
        self.top = torch.maximum(self.top, torch.maximum(high, -low))
        if self._histogram is not None:
            magnitudes = rows.abs()
            places = (torch.log2(magnitudes[magnitudes > 0]) - _LOWEST_OCTAVE) * _BINS_PER_OCTAVE
            places = places.clamp(0, len(self._histogram) - 1).long()
            self._histogram += torch.bincount(places, minlength=len(self._histogram))

    def rescale(self, scales: Tensor) -> None:
        """As if the features had been divided by scales [K]; ranges of single values (`static_scale`) are lost."""
        self._sum = self._sum / scales / scales.unsqueeze(1)
        self.top = self.top / scales

    @property
    def moments(self) -> Tensor:
        return self._sum / max(1, self._count)

    @property
    def importance(self) -> Tensor:
        """[K], the mean square of each feature; the least counts a little too."""
        diagonal = torch.diagonal(self._sum) / max(1, self._count)
        return diagonal + 1e-6 * diagonal.mean() + 1e-30

    def static_scale(self, observer: str) -> float:
        """The step of symmetric 8-bit integers for these inputs: its range is found by `observer`."""
        assert self._histogram is not None, "has_ranges was not asked for"
        largest = float(self.top.max())
        if largest == 0 or observer == "minmax":
            return max(largest, 1e-8) / _LEVELS
        places = torch.arange(len(self._histogram)) + 0.5
        middles = torch.exp2(places / _BINS_PER_OCTAVE + _LOWEST_OCTAVE)
        share = self._histogram / self._histogram.sum()
        if observer == "percentile":
            inside = torch.cumsum(share, 0) >= _PERCENTILE
            return min(largest, float(middles[int(inside.float().argmax())])) / _LEVELS
        ranges = [largest * 2 ** (-step / 8) for step in range(48)]
        losses = {"mse": _squared_error, "entropy": _divergence}
        return min(ranges, key=lambda limit: losses[observer](middles, share, limit)) / _LEVELS


def _squared_error(middles: Tensor, share: Tensor, limit: float) -> float:
    step = limit / _LEVELS
    rounded = (middles / step).round().clamp(max=_LEVELS) * step
    within = torch.where(middles < limit, torch.full_like(middles, step**2 / 12), (rounded - middles).square())
    return float((share * within).sum())


def _divergence(middles: Tensor, share: Tensor, limit: float) -> float:
    """KL of the magnitudes' distribution from what is left of it on the grid, clipped values at its end.

    Each level's mass is spread over its bins by their width; see Migacz, "8-bit Inference with TensorRT" (2017).
    """
    level = (middles / (limit / _LEVELS)).round().clamp(max=_LEVELS).long()
    width = torch.where(middles <= limit, middles, 0.0)  # bins of a logarithmic scale are as wide as they are high
    mass = torch.bincount(level, weights=share, minlength=_LEVELS + 1)
    total = torch.bincount(level, weights=width, minlength=_LEVELS + 1)
    spread = mass[level] * width / total[level].clamp(min=1e-30)
    return float((share * (torch.log(share + 1e-12) - torch.log(spread + 1e-12))).sum())


def observe(visit: Visit, linears: Mapping[str, nn.Linear], has_ranges: bool = False) -> dict[str, InputStatistics]:
    """Run the block on all batches; statistics per linear, one object for those that read the same tensor."""
    found: dict[str, InputStatistics] = {}
    owners: set[str] = set()
    seen: list[tuple[Tensor, InputStatistics]] = []

    def hook(name: str) -> Any:
        def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name not in found:
                same = next((statistics for tensor, statistics in seen if tensor is args[0]), None)
                if same is None:
                    same = InputStatistics(args[0].shape[-1], has_ranges)
                    owners.add(name)
                    seen.append((args[0], same))
                found[name] = same
            if name in owners:
                found[name].add(args[0])

        return look

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        for _ in visit.outputs():
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    return found


class _CacheRanges:
    """Stands in for a layer's cache, and notes the largest magnitudes of what is put into it."""

    def __init__(self) -> None:
        self.keys = self.values = 0.0

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys = max(self.keys, float(keys.abs().max()))
        self.values = max(self.values, float(values.abs().max()))
        return keys, values


def cache_ranges(visit: Visit) -> tuple[float, float]:
    """Largest magnitudes of the keys (turned by their positions) and values that a block puts into its cache."""
    ranges = _CacheRanges()
    for args, kwargs in visit.inputs:
        with torch.no_grad():
            visit.module(*args, **{**kwargs, "past_key_values": ranges})
    assert ranges.keys and ranges.values, "checked before work starts: attention like Llama's has a cache"
    return ranges.keys, ranges.values


def siblings(statistics: Mapping[str, InputStatistics]) -> list[list[str]]:
    """Names of the linears that read the same tensor, together: what serving may merge into one matrix."""
    groups: dict[int, list[str]] = {}
    for name, item in statistics.items():
        groups.setdefault(id(item), []).append(name)
    return list(groups.values())
