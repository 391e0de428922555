"""How far a student is from its teacher: of probabilities, of hidden states, and of relations among places.

Soft labels (Hinton et al. 2015) with other divergences for what the student wrote itself (GKD, Agarwal et al. 2023),
hidden states through learned projections (TinyBERT, Jiao et al. 2020), relations among the last layer's queries, keys
and values (MiniLM v2, Wang et al. 2021). B windows, L tokens, T places, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, mse_loss, softmax

from fastserve.compress.teacher import Wanted


def soft_loss(found: Tensor, wanted: Wanted | Tensor, temperature: float, divergence: str = "forward") -> Tensor:
    """Divergence of the student's logits [T, V] from the teacher's at a temperature, times its square; mean per place.

    divergence: "forward" KL (the teacher's mass is covered), "reverse" KL (the student keeps to it) or "jsd", the mean
    of both to the mixture. Of a teacher's likeliest tokens alone, forward: their probabilities are made to sum to one.
    """
    wanted = wanted if isinstance(wanted, Wanted) else Wanted(wanted)
    ours, theirs = log_softmax(found / temperature, -1), log_softmax(wanted.logits / temperature, -1)
    if wanted.token_ids is not None:
        assert divergence == "forward"
        ours = ours.gather(-1, wanted.token_ids)
        terms = theirs.exp() * (theirs - ours)
        return torch.where(theirs.isfinite(), terms, 0.0).sum(-1).mean() * temperature**2
    if divergence == "forward":
        loss = kl_div(ours, theirs, reduction="batchmean", log_target=True)
    elif divergence == "reverse":
        loss = kl_div(theirs, ours, reduction="batchmean", log_target=True)
    else:
        mixture = torch.logaddexp(ours, theirs) - torch.log(torch.tensor(2.0))
        sides = [kl_div(mixture, side, reduction="batchmean", log_target=True) for side in (ours, theirs)]
        loss = (sides[0] + sides[1]) / 2
    return loss * temperature**2


def relation_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """KL between how alike the places [B, L, D] of a sequence are to each other, in either model."""
    scores = [item.flatten(2).float() for item in (teacher, student)]
    relations = [item @ item.transpose(1, 2) / item.shape[-1] ** 0.5 for item in scores]
    return kl_div(
        log_softmax(relations[1], -1).flatten(0, 1), softmax(relations[0], -1).flatten(0, 1), reduction="batchmean"
    )


def hidden_loss(teacher: Sequence[Tensor], student: Sequence[Tensor], projections: nn.ModuleList) -> Tensor:
    """Mean squared difference of every student's layer, projected, and the teacher's at the same height."""
    total = student[0].new_zeros(())
    for number, (values, projection) in enumerate(zip(student, projections, strict=True)):
        wanted = teacher[(number + 1) * len(teacher) // len(student) - 1]
        total = total + mse_loss(projection(values), wanted) / wanted.square().mean()
    return total / len(student)
