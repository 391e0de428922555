"""The loss in runs of rows is PyTorch's cross-entropy, and so are its gradients."""

from __future__ import annotations

import pytest
import torch

from fastserve.train import token_loss
from fastserve.train.objectives import IGNORED, label_loss


def plain(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (7, 5), (300, 65), (40, 3000)])
def test_losses_and_gradients(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, size: int) -> None:
    monkeypatch.setattr(token_loss, "_BYTES_AT_ONCE", 4 * 65 * 17)  # several runs, the last one shorter
    generator = torch.Generator().manual_seed(rows)
    labels = torch.randint(size, (rows,), generator=generator)
    labels[1::3] = IGNORED
    logits = 4 * torch.randn(rows, size, generator=generator)
    results = []
    for function in (plain, label_loss):
        source = logits.to(dtype).requires_grad_()
        loss = function(source, labels)
        (0.3 * loss).backward()
        assert source.grad is not None and source.grad.dtype is dtype
        results.append((loss.detach(), source.grad.float()))
    (expected, gradient), (found, ours) = results
    assert torch.allclose(found, expected, rtol=1e-6)
    assert torch.allclose(ours, gradient, atol=1e-6 if dtype is torch.float32 else 2e-3)


def test_nothing_to_learn_and_nothing_to_keep() -> None:
    labels = torch.full((3,), IGNORED)
    logits = torch.randn(3, 4, requires_grad=True)
    label_loss(logits, labels).backward()
    assert logits.grad is not None and not logits.grad.any()
    with torch.no_grad():
        assert float(label_loss(torch.zeros(2, 4), torch.tensor([1, 3]))) == pytest.approx(2 * 1.3862944)


def test_half_precision_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradients are scaled before they are rounded: small ones would be lost here."""
    monkeypatch.setattr(token_loss, "token_loss", None)
    logits = torch.zeros(2, 4, dtype=torch.float16, requires_grad=True)
    label_loss(logits, torch.tensor([0, 1])).backward()
    assert logits.grad is not None and logits.grad.any()
