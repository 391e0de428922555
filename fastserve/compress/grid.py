"""The values that a compressed weight may take, and rounding to the nearest of them.

`WeightScheme` says which grid: integers of 2 to 8 bits with a scale per group, row or tensor; a codebook of free levels
times a scale per row; or 8-bit floats. Methods (GPTQ, AWQ, ...) choose scales and values on it, `storage.py` writes
them. N output features, K input features, G groups along K (1 but for integers in groups), L levels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastserve.core.errors import ConfigError

_SHRINKS = [1.0 - step / 20 for step in range(13)]  # factors on the widest range that a search tries
FLOAT8_MAX = 448.0
_MOST_AT_ONCE = 1 << 19  # weights that are looked at together: what bounds the memory for large embeddings


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """A grid.

    Attributes:
        bits: 2 to 8; codebooks 3 or 4; floats 8.
        group_size: weights along K that share a scale; 0: a row; -1: the whole tensor.
        is_symmetric: no zero points.
        kind: "int", "codebook" or "float".
    """

    bits: int = 4
    group_size: int = 128
    is_symmetric: bool = True
    kind: str = "int"

    def __post_init__(self) -> None:
        bits = {"int": range(2, 9), "codebook": (3, 4), "float": (8,)}.get(self.kind)
        if bits is None or self.bits not in bits:
            raise ConfigError(f"there are no {self.kind} weights of {self.bits} bits; int has 2 to 8, codebook 3 and 4")
        if self.kind != "int" and (self.group_size or not self.is_symmetric):
            raise ConfigError(f"{self.kind} weights have one scale per row and no zero points: group_size = 0")
        if self.group_size < -1:
            raise ConfigError(f"group_size is {self.group_size}; -1 is the whole tensor, 0 a row")

    @property
    def max_value(self) -> int:
        return (1 << self.bits) - 1

    @property
    def centre(self) -> int:
        """The zero point of symmetric integers."""
        return 1 << (self.bits - 1)

    def group(self, num_inputs: int) -> int:
        """Weights of a row that share a scale."""
        return self.group_size if self.group_size > 0 else num_inputs

    def bits_per_weight(self, num_inputs: int, scale_bits: int = 16) -> float:
        """Bits on disk per weight of a matrix with rows of `num_inputs`, scales and zero points counted."""
        extra = scale_bits + (0 if self.is_symmetric else self.bits)
        return self.bits + (0.0 if self.group_size < 0 else extra / self.group(num_inputs))


@dataclass(slots=True)
class Quantized:
    """A matrix on a grid.

    Attributes:
        scheme: the grid.
        values: [N, K] uint8 (indices or unsigned integers), or float8_e4m3fn.
        scales: [N, G], of the type in which they are stored.
        zeros: [N, G] uint8, or None when symmetric.
        codebook: [L] float32, or None.
    """

    scheme: WeightScheme
    values: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    codebook: Tensor | None = None

    def dequantize(self) -> Tensor:
        """[N, K] float32."""
        grid = Grid(self.scheme, self.scales, self.zeros, self.codebook)
        return grid.levels(self.values.float(), *grid.rows(self.values.shape[1]))


@dataclass(slots=True)
class Grid:
    """Scales and zero points (or levels) for one matrix, before its values are chosen; fields as in `Quantized`."""

    scheme: WeightScheme
    scales: Tensor
    zeros: Tensor | None = None
    codebook: Tensor | None = None

    def rows(self, num_inputs: int) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points [N, K] in float32, one for every weight."""
        zeros = None if self.zeros is None else _spread(self.zeros.float(), self.scheme, num_inputs)
        return _spread(self.scales.float(), self.scheme, num_inputs), zeros

    def indices(self, weight: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """The nearest values for weights [N, ...], given scales and zeros of the same shape."""
        if self.codebook is not None:
            return torch.bucketize(weight / scales, (self.codebook[1:] + self.codebook[:-1]) / 2)
        if self.scheme.kind == "float":
            return (weight / scales).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)
        offset = self.scheme.centre if zeros is None else zeros
        return ((weight / scales).round() + offset).clamp(0, self.scheme.max_value)

    def levels(self, indices: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """What these values stand for."""
        if self.codebook is not None:
            return self.codebook[indices.long()] * scales
        if self.scheme.kind == "float":
            return indices.float() * scales
        return (indices - (self.scheme.centre if zeros is None else zeros)) * scales

    def quantized(self, indices: Tensor) -> Quantized:
        values = indices if self.scheme.kind == "float" else indices.to(torch.uint8)
        return Quantized(self.scheme, values.contiguous(), self.scales, self.zeros, self.codebook)


def nearest(weight: Tensor, grid: Grid) -> Quantized:
    """weight [N, K], each value rounded to the nearest one of the grid."""
    step = max(1, _MOST_AT_ONCE // weight.shape[1])
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn if grid.scheme.kind == "float" else torch.uint8)
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        own = replace(grid, scales=grid.scales[rows], zeros=None if grid.zeros is None else grid.zeros[rows])
        values[rows] = own.indices(weight[rows].float(), *own.rows(weight.shape[1]))
    return grid.quantized(values)


def fit(
    weight: Tensor,
    scheme: WeightScheme,
    scale_dtype: torch.dtype = torch.float32,
    importance: Tensor | None = None,
    is_searched: bool = False,
) -> Grid:
    """Scales (and zero points) of integers or floats for weight [N, K]; codebooks are fitted in `codebook.py`.

    They span the whole range of each group, or (searched) the part of it with the least squared error.

    Args:
        importance: [K], a weight on each input's squared error, such as its mean square.
    """
    if scheme.kind == "float":
        top = weight.float().abs().amax(-1, keepdim=True)
        return Grid(scheme, _positive(top / FLOAT8_MAX, scale_dtype))
    if scheme.group_size < 0:
        grid = fit(weight.reshape(1, -1), replace(scheme, group_size=0), scale_dtype, is_searched=is_searched)
        zeros = None if grid.zeros is None else grid.zeros.expand(len(weight), 1).contiguous()
        return Grid(scheme, grid.scales.expand(len(weight), 1).contiguous(), zeros)
    group = scheme.group(weight.shape[1])
    assert weight.shape[1] % group == 0, "checked before work starts"
    importance = torch.ones(weight.shape[1]) if importance is None else importance.float()
    step = max(1, _MOST_AT_ONCE // weight.shape[1])
    parts = [
        _fit_groups(
            rows.float().view(len(rows), -1, group), importance.view(-1, group), scheme, scale_dtype, is_searched
        )
        for rows in weight.split(step)
    ]
    zeros = None if scheme.is_symmetric else torch.cat([part[1] for part in parts]).to(torch.uint8)
    return Grid(scheme, torch.cat([part[0] for part in parts]), zeros)


def _fit_groups(
    weight: Tensor, importance: Tensor, scheme: WeightScheme, scale_dtype: torch.dtype, is_searched: bool
) -> tuple[Tensor, Tensor]:
    """weight [N, G, group] -> scales and zeros [N, G]."""
    low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
    best_scales, best_zeros = torch.empty(0), torch.empty(0)
    least = torch.full(low.shape, float("inf"))
    for shrink in _SHRINKS if is_searched else (1.0,):
        if scheme.is_symmetric:  # both ends of a range with one value more below zero than above
            scales = torch.maximum(high / (scheme.centre - 1), -low / scheme.centre) * shrink
            zeros = torch.full_like(scales, scheme.centre)
        else:
            scales = (high - low) * shrink / scheme.max_value
            zeros = (-low * shrink / torch.where(scales > 0, scales, 1.0)).round().clamp(0, scheme.max_value)
        scales = _positive(scales, scale_dtype)
        if not is_searched:
            return scales, zeros
        wide, offset = scales.float().unsqueeze(-1), zeros.unsqueeze(-1)
        rounded = ((weight / wide).round() + offset).clamp(0, scheme.max_value).sub_(offset).mul_(wide)
        error = ((rounded - weight).square_() * importance).sum(-1)
        is_better = error < least
        if not len(best_scales):
            best_scales, best_zeros = scales, zeros
        best_scales = torch.where(is_better, scales, best_scales)
        best_zeros = torch.where(is_better, zeros, best_zeros)
        least = torch.where(is_better, error, least)
    return best_scales, best_zeros


def _positive(scales: Tensor, dtype: torch.dtype) -> Tensor:
    stored = torch.where(scales > 0, scales, 1.0).to(dtype)
    return torch.where(stored > 0, stored, torch.finfo(dtype).tiny)


def _spread(per_group: Tensor, scheme: WeightScheme, num_inputs: int) -> Tensor:
    return per_group.repeat_interleave(scheme.group(num_inputs), dim=1)[:, :num_inputs]
