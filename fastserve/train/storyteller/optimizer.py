"""Muon for the hidden matrices, AdamW for embeddings and norms, both on a warm-up, plateau, decay schedule.

Muon: Keller Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks", with the update scaled to
AdamW's size as in Liu et al. 2025, "Muon is scalable for LLM training", section 2.2. The plateau makes the length of a
run a late decision: any plateau checkpoint can be taken into the decay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastserve.train.storyteller.recipe import Optimizer

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM


def make_optimizers(model: LlamaForCausalLM, section: Optimizer) -> list[torch.optim.Optimizer]:
    import torch

    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed_tokens" not in name else others).append(parameter)
    return [
        torch.optim.Muon(
            matrices,
            lr=section.muon_learning_rate,
            weight_decay=section.weight_decay,
            momentum=0.95,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=section.adamw_learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_share(step: int, num_steps: int, section: Optimizer) -> float:
    """The share of the peak rate at a step counted from 0."""
    if step < section.warmup_steps:
        return (step + 1) / section.warmup_steps
    decay_start = num_steps - section.decay_steps
    if step < decay_start:
        return 1.0
    progress = (step - decay_start) / section.decay_steps
    return 1.0 - (1.0 - section.final_share) * progress


def set_learning_rates(optimizers: list[torch.optim.Optimizer], section: Optimizer, share: float) -> None:
    for optimizer, peak in zip(optimizers, (section.muon_learning_rate, section.adamw_learning_rate), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = peak * share
