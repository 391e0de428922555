"""Set single weights of a matrix to zero: by magnitude, Wanda or SparseGPT, anywhere or two of every four (2:4).

Magnitude: Han et al. (2015). Wanda: Sun et al. (2023), |weight| times the size of its input, row by row. SparseGPT:
Frantar and Alistarh (2023), as GPTQ: what a removed weight did is moved into the weights still to come. N outputs, K
inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastserve.compress.gptq import inverse_factor

_BLOCK = 128


def magnitude(weight: Tensor, ratio: float, is_2_of_4: bool = False) -> Tensor:
    """weight [N, K] with the smallest weights at zero: a share of the matrix, or two of every four."""
    if is_2_of_4:
        return weight * _keep_2_of_4(weight.abs())
    count = round(ratio * weight.numel())
    kept = torch.ones(weight.numel(), dtype=torch.bool)
    kept[weight.abs().flatten().argsort(stable=True)[:count]] = False
    return weight * kept.view_as(weight)


def wanda(weight: Tensor, sizes: Tensor, ratio: float, is_2_of_4: bool = False) -> Tensor:
    """weight [N, K] with zeros where |weight| * sizes is smallest in its row; sizes [K]: root mean square of inputs."""
    scores = weight.abs() * sizes
    if is_2_of_4:
        return weight * _keep_2_of_4(scores)
    kept = torch.ones_like(weight, dtype=torch.bool)
    kept.scatter_(1, scores.argsort(dim=1, stable=True)[:, : round(ratio * weight.shape[1])], False)
    return weight * kept


def sparsegpt(weight: Tensor, moments: Tensor, ratio: float, is_2_of_4: bool = False, damping: float = 0.01) -> Tensor:
    """weight [N, K] with zeros, the rest changed to make up for them; moments [K, K]: mean of x x^T."""
    weight = weight.float().clone()
    inverse = inverse_factor(moments.float().clone(), damping)
    diagonal = torch.diagonal(inverse)
    for start in range(0, weight.shape[1], _BLOCK):
        end = min(start + _BLOCK, weight.shape[1])
        kept = torch.ones(len(weight), end - start, dtype=torch.bool)
        if not is_2_of_4:
            scores = (weight[:, start:end] / diagonal[start:end]).square()
            kept.view(-1)[scores.flatten().argsort(stable=True)[: round(ratio * scores.numel())]] = False
        errors = torch.empty(len(weight), end - start)
        for column in range(start, end):
            if is_2_of_4 and (column - start) % 4 == 0:
                four = slice(column, column + 4)
                kept[:, column - start : column - start + 4] = _keep_2_of_4((weight[:, four] / diagonal[four]).abs())
            target = weight[:, column] * kept[:, column - start]
            error = (weight[:, column] - target) / diagonal[column]
            weight[:, column:end].addcmul_(error.unsqueeze(1), inverse[column, column:end], value=-1)
            weight[:, column] = target
            errors[:, column - start] = error
        weight[:, end:] -= errors @ inverse[start:end, end:]
    return weight


def _keep_2_of_4(scores: Tensor) -> Tensor:
    """The two largest of every four along a row."""
    fours = scores.view(len(scores), -1, 4)
    kept = torch.zeros_like(fours, dtype=torch.bool)
    kept.scatter_(2, fours.argsort(dim=2, descending=True, stable=True)[..., :2], True)
    return kept.view_as(scores)
