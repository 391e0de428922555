"""GPTQ: choose the values of a matrix column by column, each time moving the error into the columns still to come.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (2022), algorithm 1,
with the columns of the largest inputs first (scales belong to the original places, so that nothing is reordered on
disk). Works on any grid; a mask makes it SparseGPT (see `sparse.py`). N outputs, K inputs.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from fastserve.compress.grid import Grid, Quantized

_log = logging.getLogger(__name__)
_BLOCK = 128  # columns between two updates of all that are still to come


def quantize(weight: Tensor, moments: Tensor, grid: Grid, damping: float = 0.01) -> Quantized:
    """weight [N, K] on `grid`, so that the layer's outputs change little.

    Args:
        moments: [K, K] float32, the mean of x x^T over the layer's inputs.
        damping: share of the mean diagonal that is added to it.
    """
    order = torch.argsort(torch.diagonal(moments), descending=True, stable=True)
    weight = weight.float()[:, order].clone()
    scales, zeros = grid.rows(weight.shape[1])
    scales = scales[:, order].contiguous()
    zeros = None if zeros is None else zeros[:, order].contiguous()
    inverse = inverse_factor(moments[order][:, order], damping)
    indices = torch.empty_like(weight, dtype=torch.float8_e4m3fn if grid.scheme.kind == "float" else torch.float32)
    for start in range(0, weight.shape[1], _BLOCK):
        end = min(start + _BLOCK, weight.shape[1])
        errors = torch.empty(len(weight), end - start)
        for column in range(start, end):
            own = None if zeros is None else zeros[:, column]
            chosen = grid.indices(weight[:, column], scales[:, column], own)
            indices[:, column] = chosen
            level = grid.levels(indices[:, column], scales[:, column], own)
            error = (weight[:, column] - level) / inverse[column, column]
            weight[:, column:end] -= error.unsqueeze(1) * inverse[column, column:end]
            errors[:, column - start] = error
        weight[:, end:] -= errors @ inverse[start:end, end:]
    return grid.quantized(indices[:, torch.argsort(order)])


def inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of `moments`; inputs that are always zero count as ones of their own."""
    moments = moments.float().clone()
    diagonal = torch.diagonal(moments)
    diagonal[diagonal == 0] = 1.0
    mean = float(diagonal.mean())
    while True:
        damped = moments + torch.eye(len(moments)) * (damping * mean)
        factor, problem = torch.linalg.cholesky_ex(damped)
        if not problem:
            upper, problem = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not problem:
                return upper
        damping *= 10
        _log.warning("gptq: inputs are nearly dependent; damping raised to %g", damping)
        assert damping < 1e6, "moments are not finite"
