"""Checkpoints of a run in progress: weights, optimizer state and step in one safetensors file, written atomically.

This is not the exported model: see export.py for that.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM


def save_state(
    path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer], step: int, tokens_seen: int
) -> None:
    """Write everything that `load_state` needs; a kill at any moment leaves the old file or the new one whole."""
    from safetensors.torch import save_file

    tensors = {f"model.{name}": parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    for index, optimizer in enumerate(optimizers):
        for parameter_index, values in optimizer.state_dict()["state"].items():
            for key, value in values.items():
                tensors[f"optimizer.{index}.{parameter_index}.{key}"] = value.detach().contiguous()
    temporary = path.with_suffix(".partial")
    save_file(tensors, temporary, metadata={"step": str(step), "tokens_seen": str(tokens_seen)})
    os.replace(temporary, path)


def load_state(path: Path, model: LlamaForCausalLM, optimizers: list[torch.optim.Optimizer]) -> tuple[int, int]:
    """Restore in place; returns (step, tokens_seen). With no optimizers only the weights are restored."""
    import torch
    from safetensors import safe_open

    states: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in optimizers]
    parameters = dict(model.named_parameters())
    with safe_open(path, framework="pt") as file, torch.no_grad():
        metadata = file.metadata()
        for name in file.keys():  # noqa: SIM118 - safe_open is not a dict
            kind, rest = name.split(".", 1)
            if kind == "model":
                parameters[rest].copy_(file.get_tensor(name))
            elif optimizers:
                index, parameter_index, key = rest.split(".", 2)
                states[int(index)].setdefault(int(parameter_index), {})[key] = file.get_tensor(name)
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"]), int(metadata["tokens_seen"])
