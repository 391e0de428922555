"""Verify guessed tokens: sample the real one at each position, and keep going while the guess was right.

The token at a position is drawn from the model's own distribution with the position's own random number, exactly as
without guesses; a guess decides only whether the next position's logits are already there. So the tokens are the same
with and without speculation, greedy or sampled. R rows of logits, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastserve.engine.sampler import SamplingState, sample
from fastserve.kernels.reference import Kernels


def sample_verified(
    logits: Tensor, drafts: Sequence[list[int]], states: list[SamplingState], kernels: Kernels, greedy: list[int]
) -> list[list[int]]:
    """The new tokens of each sequence, at least one; they are counted in its state.

    Args:
        logits: [R, V]; each sequence has one row more than it has drafts, in order.
        drafts: per sequence, the guesses that were computed with this step.
        states: per sequence.
        greedy: the largest of each row where all sequences are greedy and the step found it already.
    """
    if not any(drafts):
        made = [[token_id] for token_id in sample(logits, states, kernels, greedy)]
        for state, (token_id,) in zip(states, made, strict=True):
            state.count(token_id)
        return made
    made = []
    row = 0
    for guesses, state in zip(drafts, states, strict=True):
        end = row + len(guesses) + 1
        made.append(_verify(logits[row:end], guesses, state, kernels, greedy[row:end]))
        row = end
    return made


def _verify(logits: Tensor, guesses: list[int], state: SamplingState, kernels: Kernels, greedy: list[int]) -> list[int]:
    tokens: list[int] = []
    if not greedy and state.is_plain_greedy:
        greedy = sample(logits, [state] * len(logits), kernels)
    for place in range(len(guesses) + 1):
        token_id = greedy[place] if greedy else sample(logits[place : place + 1], [state], kernels)[0]
        state.count(token_id)
        tokens.append(token_id)
        if place < len(guesses) and token_id != guesses[place]:
            break
    return tokens
