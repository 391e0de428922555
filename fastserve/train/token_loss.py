"""Cross-entropy of tokens over rows at a time, so that what lies between logits and their gradient stays in the caches.

Gradients are made with the loss, while a run of rows is at hand: PyTorch's own goes through [R, V] in float32 about
seven times, this one twice in the logits' type (docs/decisions/0041-the-loss-in-runs-of-rows.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BYTES_AT_ONCE = 2 << 20  # of float32


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        rows_at_once = max(1, _BYTES_AT_ONCE // (4 * logits.shape[1]))
        for start in range(0, len(logits), rows_at_once):
            rows = slice(start, start + rows_at_once)
            is_label = labels[rows] != ignored
            chosen = labels[rows].where(is_label, 0).unsqueeze(1)
            logs = torch.log_softmax(logits[rows].float(), dim=-1)
            total -= logs.gather(1, chosen)[is_label].sum()
            if gradient is not None:
                logs.exp_().scatter_add_(1, chosen, torch.full(chosen.shape, -1.0))
                gradient[rows] = logs.masked_fill_(~is_label.unsqueeze(1), 0.0)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None]:
        [gradient] = ctx.saved_tensors
        return gradient * outputs[0].to(gradient.dtype), None, None


def token_loss(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """Sum of cross-entropies in nats of logits [R, V], float32 or bfloat16, over the labels [R] that are not `ignored`.

    In float32. Not for float16, whose gradients have to be scaled before they are rounded.
    """
    result: Tensor = _TokenLoss.apply(logits, labels, ignored)
    return result
