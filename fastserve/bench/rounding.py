"""Weights rounded to the nearest value in the kernels' own form: for benchmarks and tests of kernels.

Folders for use are made by `fastserve.compress`. N output features, K input features, G groups along K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastserve.checkpoint.quantized import QuantizedWeight, QuantScheme

_CODEBOOK_SIZE = 16


def quantize(
    weight: Tensor,
    scheme: QuantScheme,
    scale_dtype: torch.dtype = torch.float32,
    codebook: Tensor | None = None,
) -> QuantizedWeight:
    """Round weight [N, K] to the nearest value that `scheme` can hold; a codebook is made unless one is given."""
    if scheme.has_codebook:
        return _quantize_codebook(weight.float(), scheme, scale_dtype, codebook)
    num_rows, num_inputs = weight.shape
    group = scheme.group_size or num_inputs
    padded = torch.nn.functional.pad(weight.float(), (0, -num_inputs % group)).view(num_rows, -1, group)
    if scheme.is_symmetric:
        scales = padded.abs().amax(-1) / (scheme.centre - 1)
        zeros = torch.full_like(scales, scheme.centre)
    else:
        low, high = padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)
        scales = (high - low) / scheme.max_value
        zeros = (-low / torch.where(scales > 0, scales, 1.0)).round()
    scales = torch.where(scales > 0, scales, 1.0).to(scale_dtype)
    values = (padded / scales.float().unsqueeze(-1)).round() + zeros.unsqueeze(-1)
    values = values.clamp(0, scheme.max_value).to(torch.uint8).view(num_rows, -1)[:, :num_inputs].contiguous()
    return QuantizedWeight(scheme, values, scales, None if scheme.is_symmetric else zeros.to(torch.uint8))


def _quantize_codebook(
    weight: Tensor, scheme: QuantScheme, scale_dtype: torch.dtype, levels: Tensor | None
) -> QuantizedWeight:
    scales = weight.abs().amax(-1, keepdim=True)
    scales = torch.where(scales > 0, scales, 1.0).to(scale_dtype)
    flat = (weight / scales.float()).flatten()
    if levels is None:
        levels = _find_levels(flat[:: max(1, len(flat) // 65536)].contiguous())  # enough to place 16
    values = torch.bucketize(flat, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    return QuantizedWeight(scheme, values.view(weight.shape), scales, codebook=levels)


def _find_levels(sample: Tensor, num_rounds: int = 8) -> Tensor:
    """Lloyd's algorithm on weights scaled row by row to a largest magnitude of 1, started at quantiles."""
    levels = torch.quantile(sample, (torch.arange(_CODEBOOK_SIZE) + 0.5) / _CODEBOOK_SIZE)
    for _ in range(num_rounds):
        nearest = torch.bucketize(sample, (levels[1:] + levels[:-1]) / 2)
        counts = torch.bincount(nearest, minlength=_CODEBOOK_SIZE)
        sums = torch.bincount(nearest, weights=sample, minlength=_CODEBOOK_SIZE).float()
        levels = torch.where(counts > 0, sums / counts.clamp(min=1), levels).sort().values
    return levels
