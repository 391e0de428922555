"""What holds for a student's matrices while it is trained: zeros that stay or grow, low rank, and rounding.

Each is a parametrisation of the weight (`torch.nn.utils.parametrize`) or a mask on it, and is gone when training ends:
what is left is a plain matrix. N output features, K input features, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastserve.compress.grid import WeightScheme, fit, nearest
from fastserve.compress.network import find_blocks
from fastserve.compress.recipe import Distill
from fastserve.compress.sparse import magnitude
from fastserve.core.errors import ConfigError

_MASKED = 0.05  # share of zeros from which on a matrix counts as pruned
_SPARSER_EVERY = 10
_SCHEDULE_END = 0.75  # of the steps; the rest mends


class Masks:
    """Zeros of matrices, put back after every step; more of them as `step.sparsity` asks.

    Gradual pruning: Zhu and Gupta (2017); the share grows with the cube of what is left, or in a line.
    """

    def __init__(self, student: Any, step: Distill) -> None:
        self._step = step
        self._weights = [linear.weight for _, linear in _linears(student)] if step.sparsity else []
        self._masks = [] if step.sparsity or step.lora_rank else _zeros(student)

    def apply(self, number: int) -> None:
        """After step `number`."""
        if self._step.sparsity and number % _SPARSER_EVERY == 0:
            share = self.share(number)
            self._masks = [(weight, magnitude(weight.data, share) != 0) for weight in self._weights]
        for weight, mask in self._masks:
            weight.data.mul_(mask)

    def share(self, number: int) -> float:
        """Of zeros after step `number`."""
        done = min(1.0, (number + _SPARSER_EVERY) / max(1.0, _SCHEDULE_END * self._step.steps))
        return self._step.sparsity * (1 - (1 - done) ** 3 if self._step.sparsity_schedule == "cubic" else done)


def constrain(student: Any, step: Distill) -> list[nn.Parameter]:
    """Put low rank and rounding on the student; returns the parameters that are trained."""
    if not step.lora_rank:
        trained = list(student.parameters())
    else:
        student.requires_grad_(False)
        trained = []
        for _, linear in _linears(student):
            low_rank = _LowRank(linear.weight.data, step.lora_rank)
            parametrize.register_parametrization(linear, "weight", low_rank)
            trained += [low_rank.a, low_rank.b]
    for name, linear in _linears(student) if step.bits else []:
        if linear.in_features % (step.group_size or linear.in_features):
            raise ConfigError(f"distill: group_size = {step.group_size} does not divide the inputs of {name}")
        parametrize.register_parametrization(linear, "weight", _Rounded(WeightScheme(step.bits, step.group_size)))
    return trained


def release(student: Any) -> None:
    """Make plain matrices of what was constrained: with the low-rank part, not rounded."""
    for module in list(student.modules()):
        if parametrize.is_parametrized(module, "weight"):
            parts: Any = module.parametrizations
            for part in parts.weight:
                part.is_ending = True
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


class _Rounded(nn.Module):
    """Rounds a weight [N, K]; its gradient is that of the weight itself (Bengio et al. 2013)."""

    def __init__(self, scheme: WeightScheme) -> None:
        super().__init__()
        self._scheme = scheme
        self.is_ending = False

    def forward(self, weight: Tensor) -> Tensor:
        if self.is_ending:
            return weight
        rounded = nearest(weight.detach(), fit(weight.detach(), self._scheme)).dequantize()
        return weight + (rounded - weight).detach()


class _LowRank(nn.Module):
    """Adds b a to a weight [N, K] that stays (LoRA, Hu et al. 2021); zeros of a pruned weight stay zeros."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.b = nn.Parameter(torch.zeros(len(weight), rank))
        mask = weight != 0
        self.mask = mask if float(mask.float().mean()) < 1 - _MASKED else None
        self.is_ending = False

    def forward(self, weight: Tensor) -> Tensor:
        change = self.b @ self.a
        return weight + (change if self.mask is None else change * self.mask)


def _linears(student: Any) -> list[tuple[str, nn.Linear]]:
    """Linears of the blocks, by name."""
    return [
        (f"{block}.{name}", module)
        for block in find_blocks(student)
        for name, module in student.get_submodule(block).named_modules()
        if isinstance(module, nn.Linear)
    ]


def _zeros(student: Any) -> list[tuple[Tensor, Tensor]]:
    """Matrices that were pruned, and where they are not zero."""
    found = []
    for module in student.modules():
        if isinstance(module, nn.Linear):
            mask = module.weight.data != 0
            if float(mask.float().mean()) < 1 - _MASKED:
                found.append((module.weight, mask))
    return found
