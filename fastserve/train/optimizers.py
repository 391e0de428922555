"""Optimizers, their schedule, and the moving average of the weights.

Muon (Jordan et al. 2024) moves the hidden matrices, with the update scaled to AdamW's size (Liu et al. 2025, "Muon is
scalable for LLM training", section 2.2); AdamW moves the rest. The plateau of `wsd` makes the length of a run a late
decision: any checkpoint on it can be taken into the decay (Hu et al. 2024, "MiniCPM", section 4).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastserve.train.settings import OptimizerSection

if TYPE_CHECKING:
    import torch

    Parameter = torch.nn.Parameter
_RATE = "peak_learning_rate"


def make_optimizers(network: Any, section: OptimizerSection) -> list[torch.optim.Optimizer]:
    """AdamW alone, or Muon and AdamW. Norms, biases and embeddings do not decay; heads are no hidden matrices."""
    import torch

    embeddings = {id(module.weight) for module in network.modules() if isinstance(module, torch.nn.Embedding)}
    body = {id(parameter) for parameter in network.base_model.parameters()}
    heads = {
        id(module.weight)
        for module in network.modules()
        if isinstance(module, torch.nn.Linear)
        and id(module.weight) not in body
        and module.in_features != module.out_features
    }
    matrices, others, free = [], [], []
    for parameter in network.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or id(parameter) in embeddings:
            free.append(parameter)
        elif parameter.ndim == 2 and id(parameter) not in heads:
            matrices.append(parameter)
        else:
            others.append(parameter)
    if section.kind == "adamw":
        groups = [*_groups(matrices + others, section.weight_decay), *_groups(free, 0.0)]
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=section.learning_rate, betas=(section.beta_1, section.beta_2))
        ]
    else:
        muon = torch.optim.Muon(
            matrices,
            lr=section.muon_learning_rate,
            weight_decay=section.weight_decay,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        )
        groups = [*_groups(others, section.weight_decay), *_groups(free, 0.0)]
        optimizers = [muon, torch.optim.AdamW(groups, lr=section.learning_rate, betas=(section.beta_1, section.beta_2))]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group[_RATE] = group["lr"]
    return optimizers


def rate_share(step: int, num_steps: int, section: OptimizerSection) -> float:
    """The share of the peak rate at a step counted from 0."""
    if step < section.warmup_steps:
        return (step + 1) / section.warmup_steps
    start = num_steps - section.decay_steps if section.schedule == "wsd" else section.warmup_steps
    progress = min(1.0, max(0.0, (step - start) / max(1, num_steps - start)))
    if section.schedule == "constant":
        return 1.0
    if section.schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return 1.0 - (1.0 - section.final_share) * progress


def set_rates(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group[_RATE] * share


def make_states(optimizers: list[torch.optim.Optimizer]) -> None:
    """Have every optimizer allocate its state, by a step that changes nothing."""
    import torch

    for optimizer in optimizers:
        set_rates([optimizer], 0.0)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        set_rates([optimizer], 1.0)
        for state in optimizer.state.values():
            if "step" in state:  # AdamW corrects its means by it: the first step that learns must be its first
                state["step"].zero_()


def alike(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Tensors in lists of one placement on the mesh: operations on many at once do not take a mixture."""
    lists: dict[Any, list[torch.Tensor]] = defaultdict(list)
    for tensor in tensors:
        mesh, placements = getattr(tensor, "device_mesh", None), getattr(tensor, "placements", None)
        lists[(id(mesh), str(placements))].append(tensor)
    return list(lists.values())


def clip_gradients(
    parameters: list[Parameter],
    max_norm: float,
    loss_scale: float = 1.0,
    whole_norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> float:
    """Undo `loss_scale` and bring all gradients to at most `max_norm` together.

    `whole_norm` makes the norm of all from that of these, where other processes have other weights. Returns the norm
    before, the same on every process.
    """
    import torch

    lists = alike([parameter.grad for parameter in parameters if parameter.grad is not None])
    norms = [_whole(torch.nn.utils.get_total_norm(gradients)) for gradients in lists]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    total = (whole_norm(norm) if whole_norm else norm) / loss_scale
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0) / loss_scale
    for gradients in lists:
        torch._foreach_mul_(gradients, scale.to(gradients[0].device))
    return float(total)


class MovingAverage:
    """An exponential moving average of the weights, of each process's own part of them."""

    def __init__(self, named: dict[str, Parameter], decay: float) -> None:
        self._decay = decay
        self.weights = {name: parameter.detach().clone() for name, parameter in named.items()}

    def update(self, named: dict[str, Parameter], step: int) -> None:
        """Take in the weights after a step; early on the average forgets faster."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, parameter in named.items():
            _local(self.weights[name]).lerp_(_local(parameter.detach()), 1 - decay)

    def swap(self, named: dict[str, Parameter]) -> None:
        """Exchange weights and average; again to go back."""
        for name, parameter in named.items():
            weights, average = _local(parameter.detach()), _local(self.weights[name])
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)


def _groups(parameters: list[Any], weight_decay: float) -> list[dict[str, Any]]:
    return [{"params": group, "weight_decay": weight_decay} for group in alike(parameters)]


def _local(tensor: Any) -> Any:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _whole(tensor: Any) -> Any:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
