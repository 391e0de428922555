"""Logits -> the next token of each sequence, by its own SamplingParams.

Randomness is a function of (seed, index of the token), not of a generator's state, so a sequence's tokens do not
depend on what else is in the batch, on preemption or on chunking. Penalties, bias and masks are applied here; the
draw itself (`Kernels.sample`) takes all rows at once. V vocabulary size, R rows.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastserve.core.request import TokenLogprobs
from fastserve.core.sampling_params import SamplingParams
from fastserve.kernels.interface import RowSampling
from fastserve.kernels.reference import Kernels

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_GREEDY = RowSampling(inverse_temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, random=0)
_LARGEST_FACTOR = 1e30  # a colder temperature is greedy in float32


@dataclass(slots=True)
class SamplingState:
    """What the sampler remembers of one live sequence.

    Attributes:
        stop_ids: end tokens and stop ids, masked until min_tokens are made.
        prompt_ids: distinct ids of the prompt.
        output_counts: id -> times made so far.
        num_output: tokens made so far.
        history: prompt (of an encoder-decoder: the decoder's) and output; only with no_repeat_ngram_size.
        repeats: for each place in it, how many tokens before it are the last ones; a new one adds to each, or ends it.
    """

    sampling: SamplingParams
    stop_ids: tuple[int, ...]
    prompt_ids: frozenset[int] = frozenset()
    output_counts: dict[int, int] = field(default_factory=dict)
    num_output: int = 0
    history: array[int] = field(default_factory=lambda: array("i"))
    repeats: np.ndarray | None = None

    def count(self, token_id: int) -> None:
        self.num_output += 1
        if self.sampling.no_repeat_ngram_size:
            self.history.append(token_id)
        self.output_counts[token_id] = self.output_counts.get(token_id, 0) + 1

    @property
    def is_plain_greedy(self) -> bool:
        return self.sampling.is_greedy and self.sampling.num_beams == 1 and not self.changes_logits

    @property
    def changes_logits(self) -> bool:
        sampling = self.sampling
        return bool(
            sampling.logit_bias
            or sampling.repetition_penalty != 1.0
            or sampling.presence_penalty
            or sampling.frequency_penalty
            or self.num_output < sampling.min_tokens
            or sampling.no_repeat_ngram_size
            or sampling.suppress_token_ids
            or self.is_forced_to_end
        )

    @property
    def is_forced_to_end(self) -> bool:
        """Whether the next token is `forced_eos_token_id`."""
        sampling = self.sampling
        return sampling.forced_eos_token_id is not None and self.num_output + 1 == sampling.max_tokens

    def banned_ids(self) -> list[int]:
        """Tokens that may not come next."""
        banned = [*self.sampling.suppress_token_ids]
        if self.num_output < self.sampling.min_tokens:
            banned += self.stop_ids
        size = self.sampling.no_repeat_ngram_size
        if size and self.history:
            past = np.frombuffer(self.history, np.int32)
            if self.repeats is None:
                self.repeats = np.zeros(max(0, len(past) + 1 - size), np.int32)
            for place in range(len(self.repeats), len(past)):
                self.repeats = np.append(np.int32(0), (self.repeats + 1) * (past[:place] == past[place]))
            banned += {*past[self.repeats >= size - 1].tolist()}
        return banned


def random_bits(seed: int, index: int) -> int:
    """53 bits that depend on nothing but the arguments (SplitMix64's finaliser, Steele et al., 2014)."""
    return _mix(_mix(seed & _MASK) + (index + 1) * _GOLDEN) >> 11


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def sample(logits: Tensor, states: list[SamplingState], kernels: Kernels, greedy: list[int] | None = None) -> list[int]:
    """Choose one token per row. logits [R, V] is not changed; `states` has R entries.

    greedy: the largest of each row, where the step found it already and nothing else is asked of any.
    """
    if greedy:
        return greedy
    if any(state.changes_logits for state in states):
        logits = logits.to(torch.float32, copy=True)
        for row, state in zip(logits, states, strict=True):
            if state.changes_logits:
                process_logits(row, state)
    return kernels.sample(logits, [_row_sampling(state) for state in states])


def _row_sampling(state: SamplingState) -> RowSampling:
    sampling = state.sampling
    if sampling.is_greedy:
        return _GREEDY
    assert sampling.seed is not None, "a request is given a seed where it enters"
    return RowSampling(
        inverse_temperature=min(1.0 / sampling.temperature, _LARGEST_FACTOR),
        top_k=max(sampling.top_k, 0),
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        random=random_bits(sampling.seed, state.num_output),
    )


def process_logits(logits: Tensor, state: SamplingState) -> Tensor:
    """Apply penalties, bias and what may not or must come next to one row [V], which is returned."""
    sampling = state.sampling
    device = logits.device
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(state.prompt_ids | state.output_counts.keys()), dtype=torch.int64, device=device)
        values = logits[seen]
        penalty = sampling.repetition_penalty
        logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if state.output_counts and (sampling.presence_penalty or sampling.frequency_penalty):
        made = torch.tensor(list(state.output_counts), dtype=torch.int64, device=device)
        counts = torch.tensor(list(state.output_counts.values()), dtype=logits.dtype, device=device)
        logits[made] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), dtype=torch.int64, device=device)
        logits[ids] += torch.tensor(list(sampling.logit_bias.values()), dtype=logits.dtype, device=device)
    if banned := state.banned_ids():
        logits[torch.tensor(banned, dtype=torch.int64, device=device)] = float("-inf")
    if sampling.forced_eos_token_id is not None and state.is_forced_to_end:
        logits.fill_(float("-inf"))[sampling.forced_eos_token_id] = 0.0
    return logits


def gather_logprobs(logits: Tensor, token_ids: list[int], num_top: list[int]) -> list[TokenLogprobs]:
    """Log probabilities at R positions: the given token first, then the `num_top[r]` most probable ones.

    logits [R, V] float32, raw. The given token appears once more among the top ones when it belongs there.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, dtype=torch.int64, device=logits.device)[:, None])  # [R, 1]
    ranks = ((logprobs > chosen).sum(-1) + 1).tolist()
    top_values, top_ids = torch.topk(logprobs, min(max(1, *num_top), logits.shape[-1]), dim=-1)
    rows = zip(token_ids, chosen[:, 0].tolist(), ranks, top_ids.tolist(), top_values.tolist(), num_top, strict=True)
    return [
        TokenLogprobs([token_id, *ids[:num]], [value, *values[:num]], rank)
        for token_id, value, rank, ids, values, num in rows
    ]
