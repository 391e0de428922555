"""The sampler against plain definitions: penalties, determinism and the distribution it draws from.

Filters and the draw itself: tests/kernels/test_sample.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from fastserve.core.sampling_params import SamplingParams
from fastserve.engine.sampler import SamplingState, gather_logprobs, process_logits, random_bits, sample
from fastserve.kernels.reference import Kernels

KERNELS = Kernels()


def make_state(**options: object) -> SamplingState:
    return SamplingState(SamplingParams(seed=1, **options), stop_ids=(0, 2))  # type: ignore[arg-type]


def test_random_bits_are_a_fixed_function_spread_evenly() -> None:
    values = [random_bits(seed, index) * 2.0**-53 for seed in range(100) for index in range(100)]
    assert random_bits(3, 4) == random_bits(3, 4)
    assert len(set(values)) == len(values)
    assert all(0 <= value < 1 for value in values)
    counts = torch.histc(torch.tensor(values), bins=10, min=0, max=1)
    assert counts.min() > 850 and counts.max() < 1150


def test_penalties_and_bias_follow_their_definitions() -> None:
    state = make_state(
        repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={5: 3.0}, temperature=0.0
    )
    state.prompt_ids = frozenset({3})
    state.count(4)
    state.count(4)
    logits = torch.tensor([1.0, 1.0, 1.0, 2.0, -2.0, 0.0])
    expected = [1.0, 1.0, 1.0, 1.0, -4.0 - 0.5 - 2 * 0.25, 3.0]
    given = logits.clone()
    assert process_logits(given, state).tolist() == pytest.approx(expected)
    sample(logits[None], [state], Kernels())
    assert logits.tolist() == [1.0, 1.0, 1.0, 2.0, -2.0, 0.0]


def test_min_tokens_masks_the_ends_until_reached() -> None:
    state = make_state(min_tokens=1, temperature=0.0)
    logits = torch.tensor([[9.0, 1.0, 5.0, 2.0]])
    assert sample(logits, [state], KERNELS) == [3]
    state.count(3)
    assert sample(logits, [state], KERNELS) == [0]


def test_a_row_is_drawn_alike_alone_and_among_others() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    params = [{}, {"top_p": 0.8}, {"top_k": 5}, {"temperature": 0.0}, {"min_p": 0.1}, {"frequency_penalty": 1.0}]
    states = [make_state(**options) for options in params]
    together = sample(logits, states, KERNELS)
    assert together == [sample(logits[row : row + 1], [states[row]], KERNELS)[0] for row in range(6)]


def test_draws_follow_the_softmax_at_the_temperature() -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0])
    state = make_state(temperature=0.7)
    counts = [0] * 4
    for _ in range(4000):
        counts[sample(logits[None], [state], KERNELS)[0]] += 1
        state.num_output += 1
    expected = torch.softmax(logits / 0.7, -1)
    for count, probability in zip(counts, expected.tolist(), strict=True):
        assert abs(count / 4000 - probability) < 4 * math.sqrt(probability * (1 - probability) / 4000)


def test_logprobs_give_the_token_its_rank_and_the_best() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    (item,) = gather_logprobs(logits, [2], [2])
    reference = torch.log_softmax(logits[0], -1)
    assert item.token_ids == [2, 1, 2]
    assert item.rank == 2
    assert item.logprobs == pytest.approx([reference[2].item(), reference[1].item(), reference[2].item()])
    (bare,) = gather_logprobs(logits, [0], [0])
    assert (bare.token_ids, bare.rank) == ([0], 3)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 40])
def test_no_run_of_tokens_comes_twice(size: int) -> None:
    """Whatever was looked at before: after a prompt, token by token, and with a last one that a search changed."""
    tokens = torch.randint(3, (300,), generator=torch.Generator().manual_seed(size)).tolist()
    tokens[100:180] = [1] * 80
    state = make_state(no_repeat_ngram_size=size)
    state.history.extend(tokens[:30])
    for end in range(30, 300):
        past, begun = tokens[:end], tokens[end + 1 - size : end]
        expected = {past[last] for last in range(size - 1, end) if past[last + 1 - size : last] == begun}
        assert set(state.banned_ids()) == expected
        state.count(0)
        state.history[-1] = tokens[end]
