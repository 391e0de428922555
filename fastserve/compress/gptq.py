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
    scales, zeros = grid.rows(weight.shape[1])
    # [K, N], so that what belongs to a column lies together.
    columns = weight.float().t()[order]
    scales = scales.t()[order]
    zeros = None if zeros is None else zeros.t()[order]
    inverse = inverse_factor(moments[order.unsqueeze(1), order].float(), damping)
    indices = torch.empty_like(columns, dtype=torch.float8_e4m3fn if grid.scheme.kind == "float" else torch.float32)
    for start in range(0, len(columns), _BLOCK):
        end = min(start + _BLOCK, len(columns))
        errors = torch.empty(end - start, columns.shape[1])
        for column in range(start, end):
            own = None if zeros is None else zeros[column]
            indices[column] = grid.indices(columns[column], scales[column], own)
            level = grid.levels(indices[column], scales[column], own)
            error = torch.div(columns[column] - level, inverse[column, column], out=errors[column - start])
            columns[column:end].addcmul_(inverse[column, column:end].unsqueeze(1), error, value=-1)
        columns[end:].addmm_(inverse[start:end, end:].t(), errors, alpha=-1)
    return grid.quantized(indices[torch.argsort(order)].t())


def inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of `moments` (float32, its diagonal is overwritten); inputs that are always
    zero count as ones of their own."""
    diagonal = torch.diagonal(moments)
    diagonal = torch.where(diagonal == 0, 1.0, diagonal)
    mean = float(diagonal.mean())
    while True:
        torch.diagonal(moments).copy_(diagonal + damping * mean)
        factor, problem = torch.linalg.cholesky_ex(moments)
        if not problem:
            inverse = torch.cholesky_inverse(factor)
            del factor  # matrices of K x K are what takes memory here
            upper, problem = torch.linalg.cholesky_ex(inverse, upper=True)
            if not problem:
                return upper
        damping *= 10
        _log.warning("gptq: inputs are nearly dependent; damping raised to %g", damping)
        assert damping < 1e6, "moments are not finite"
