"""Linear modules whose weights stay in 4 bits while low-rank additions are tuned (QLoRA).

Weights are held as NF4: 16 levels at the quantiles of a normal distribution, a float32 scale for every 64 weights (4.5
bits a weight). Forward and backward each make the dense weight for a moment and keep neither, on any device.

Source: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3 (without double quantisation).
"""

from __future__ import annotations

from typing import Any

import torch

from fastserve.core.errors import ConfigError

BLOCK = 64
_LEVELS = (
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
)  # fmt: skip


class FourBitLinear(torch.nn.Linear):
    """A frozen linear module over packed weights; `weight` makes the dense ones."""

    codes: torch.Tensor  # uint8, two weights each
    scales: torch.Tensor  # [weights / BLOCK]

    def __init__(self, dense: torch.nn.Linear) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = dense.in_features, dense.out_features
        codes, scales = _packed(dense.weight.detach())
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)
        self.bias = None if dense.bias is None else torch.nn.Parameter(dense.bias.detach().float(), requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """[out, in], float32."""
        return _dense(self.codes, self.scales, self.out_features)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        kind = inputs.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
        output: torch.Tensor = _Product.apply(inputs.to(dtype), self.codes, self.scales, self.out_features)
        return output if self.bias is None else output + self.bias.to(dtype)

    def as_dense(self) -> torch.nn.Linear:
        """An ordinary module with the weights that this one computes with."""
        dense = torch.nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        dense.weight = torch.nn.Parameter(self.weight, requires_grad=False)
        dense.bias = self.bias
        return dense


def quantize_linears(network: Any, excluded: tuple[str, ...] = ()) -> None:
    """Hold every linear module of a network in 4 bits, except heads: those named, and the one over the vocabulary.

    ConfigError where there is nothing to quantise or a width is not a multiple of 64.
    """
    head = network.get_output_embeddings()
    chosen = {
        name: module
        for name, module in network.named_modules()
        if type(module) is torch.nn.Linear and module is not head and name.split(".")[0] not in excluded
    }
    if not chosen:
        raise ConfigError("qlora: this network has no linear modules; use lora_rank without it")
    for name, module in chosen.items():
        if module.in_features % BLOCK:
            raise ConfigError(f"qlora: {name} has {module.in_features} inputs, not a multiple of {BLOCK}")
        _replace(network, name, FourBitLinear(module))


def dense_again(network: torch.nn.Module) -> None:
    """Undo `quantize_linears` in place, but for what rounding lost."""
    for name, module in list(network.named_modules()):
        if isinstance(module, FourBitLinear):
            _replace(network, name, module.as_dense())


class _Product(torch.autograd.Function):
    """inputs @ weight.T, where only the packed weight is kept for the way back."""

    @staticmethod
    def forward(context: Any, inputs: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, rows: int) -> Any:
        context.save_for_backward(codes, scales)
        context.rows = rows
        return inputs @ _dense(codes, scales, rows).to(inputs.dtype).T

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> Any:
        (gradient,) = gradients
        codes, scales = context.saved_tensors
        return gradient @ _dense(codes, scales, context.rows).to(gradient.dtype), None, None, None


def _packed(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes [weights / 2], scales [weights / BLOCK]): the nearest level of each weight over its block's largest."""
    levels = torch.tensor(_LEVELS, device=weight.device)
    blocks = weight.float().reshape(-1, BLOCK)
    scales = blocks.abs().amax(1).clamp(min=1e-12)
    borders = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / scales[:, None], borders).to(torch.uint8).reshape(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1], scales


def _dense(codes: torch.Tensor, scales: torch.Tensor, rows: int) -> torch.Tensor:
    levels = torch.tensor(_LEVELS, device=codes.device)
    numbers = torch.stack([codes >> 4, codes & 15], dim=-1).long()
    return (levels[numbers].reshape(-1, BLOCK) * scales[:, None]).reshape(rows, -1)


def _replace(network: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(network.get_submodule(parent), own, module)
