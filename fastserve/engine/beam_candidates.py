"""What a beam search is given of a step: each beam's most probable next tokens. R rows of logits, V vocabulary size.

Tokens that may not come next are left out after the softmax, whose values stay as they were (as transformers has it).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastserve.core.request import TokenLogprobs
from fastserve.engine.sampler import SamplingState
from fastserve.scheduler.beams import num_candidates

_BLOCK = 128


def find_candidates(logits: Tensor, states: Sequence[SamplingState], last_ids: Sequence[int]) -> list[TokenLogprobs]:
    """Candidates of each beam, the best first, behind a token that does not count.

    Args:
        logits: [R, V] float32, a row per beam; changed.
        states: of the beams; a token is counted in each.
        last_ids: the token that each beam ends with, which the search chose.
    """
    sums = torch.logsumexp(logits, dim=-1, keepdim=True)
    banned: list[tuple[int, int]] = []
    for row, (state, last_id) in enumerate(zip(states, last_ids, strict=True)):
        if state.history:
            state.history[-1] = last_id
        banned += [(row, token_id) for token_id in state.banned_ids()]
        state.count(0)  # a place for the token that the search will choose
    if banned:
        logits[torch.tensor(banned, device=logits.device).unbind(1)] = float("-inf")
    wanted = [num_candidates(state.sampling.num_beams, len(state.stop_ids)) for state in states]
    values, ids_of = _largest(logits, min(max(wanted), logits.shape[1]))
    return [
        TokenLogprobs([0, *ids[:count]], [0.0, *row[:count]], 0)
        for row, ids, count in zip((values - sums).tolist(), ids_of.tolist(), wanted, strict=True)
    ]


def _largest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and places of the largest of each row, in order. They lie in the blocks with the largest maxima."""
    num_blocks = logits.shape[1] // _BLOCK
    if num_blocks <= 2 * count:
        return logits.topk(count)
    whole = num_blocks * _BLOCK
    blocks = logits[:, :whole].unflatten(1, (num_blocks, _BLOCK)).amax(-1).topk(count).indices  # [R, count]
    places = (blocks[..., None] * _BLOCK + torch.arange(_BLOCK, device=logits.device)).flatten(1)
    rest = torch.arange(whole, logits.shape[1], device=logits.device).expand(len(logits), -1)
    places = torch.cat((places, rest), dim=1)
    best = logits.gather(1, places).topk(count)
    return best.values, places.gather(1, best.indices)
