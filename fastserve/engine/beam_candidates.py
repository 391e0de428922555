"""What a beam search is given of a step: each beam's most probable next tokens. R rows of logits, V vocabulary size.

Tokens that may not come next are left out after the softmax, whose values stay as they were (as transformers has it).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastserve.core.request import TokenLogprobs
from fastserve.engine.sampler import SamplingState
from fastserve.kernels.reference import Kernels
from fastserve.scheduler.beams import num_candidates


def find_candidates(
    logits: Tensor, states: Sequence[SamplingState], last_ids: Sequence[int], kernels: Kernels
) -> list[TokenLogprobs]:
    """Candidates of each beam, the best first, behind a token that does not count.

    Args:
        logits: [R, V] float32, a row per beam; changed.
        states: of the beams; a token is counted in each.
        last_ids: the token that each beam ends with, which the search chose.
    """
    banned: list[tuple[int, int]] = []
    for row, (state, last_id) in enumerate(zip(states, last_ids, strict=True)):
        if state.history:
            state.history[-1] = last_id
        banned += [(row, token_id) for token_id in state.banned_ids()]
        state.count(0)  # a place for the token that the search will choose
    wanted = [num_candidates(state.sampling.num_beams, len(state.stop_ids)) for state in states]
    most = min(max(wanted), logits.shape[1])
    sums, values, ids_of = kernels.most_probable(logits, 1 if banned else most)
    if banned:
        logits[torch.tensor(banned, device=logits.device).unbind(1)] = float("-inf")
        _, values, ids_of = kernels.most_probable(logits, most)
    return [
        TokenLogprobs([0, *ids[:count]], [0.0, *row[:count]], 0)
        for row, ids, count in zip((values - sums).tolist(), ids_of.tolist(), wanted, strict=True)
    ]
