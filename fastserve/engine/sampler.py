"""Logits -> the next token of each sequence, by its own SamplingParams.

Randomness is a function of (seed, index of the token), not of a generator's state, so a sequence's tokens do not
depend on what else is in the batch, on preemption or on chunking. Rows that only need the most probable token take
one argmax together. V vocabulary size, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastserve.core.request import TokenLogprobs
from fastserve.core.sampling_params import SamplingParams

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FEW = 256  # candidates looked at before a full sort, for top-p


@dataclass(slots=True)
class SamplingState:
    """What the sampler remembers of one live sequence.

    Attributes:
        stop_ids: end tokens and stop ids, masked until min_tokens are made.
        prompt_ids: distinct ids of the prompt.
        output_counts: id -> times made so far.
        num_output: tokens made so far.
    """

    sampling: SamplingParams
    stop_ids: tuple[int, ...]
    prompt_ids: frozenset[int] = frozenset()
    output_counts: dict[int, int] = field(default_factory=dict)
    num_output: int = 0

    def count(self, token_id: int) -> None:
        self.num_output += 1
        self.output_counts[token_id] = self.output_counts.get(token_id, 0) + 1

    @property
    def is_plain_greedy(self) -> bool:
        return self.sampling.is_greedy and not self.changes_logits

    @property
    def changes_logits(self) -> bool:
        sampling = self.sampling
        return bool(
            sampling.logit_bias
            or sampling.repetition_penalty != 1.0
            or sampling.presence_penalty
            or sampling.frequency_penalty
            or self.num_output < sampling.min_tokens
        )


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments (SplitMix64's finaliser, Steele et al., 2014)."""
    return (_mix(_mix(seed & _MASK) + (index + 1) * _GOLDEN) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def sample(logits: Tensor, states: list[SamplingState], greedy: list[int] | None = None) -> list[int]:
    """Choose one token per row. logits [R, V] float32 is not changed; `states` has R entries.

    greedy: the largest of each row where the step found it already.
    """
    tokens = list(greedy) if greedy else [0] * len(states)
    if not greedy and any(state.is_plain_greedy for state in states):
        tokens = logits.argmax(dim=-1).tolist()
    for row, state in enumerate(states):
        if state.is_plain_greedy:
            continue
        changed = process_logits(logits[row], state) if state.changes_logits else logits[row]
        if state.sampling.is_greedy:
            tokens[row] = int(changed.argmax())
        else:
            tokens[row] = _draw(changed, state)
    return tokens


def process_logits(logits: Tensor, state: SamplingState) -> Tensor:
    """A copy of one row [V] with penalties, bias and the mask of early stops applied."""
    sampling = state.sampling
    logits = logits.clone()
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
    if state.num_output < sampling.min_tokens and state.stop_ids:
        logits[torch.tensor(state.stop_ids, dtype=torch.int64, device=device)] = float("-inf")
    return logits


def _draw(logits: Tensor, state: SamplingState) -> int:
    """Inverse-CDF sampling from one row [V], over the vocabulary's order."""
    sampling = state.sampling
    probs = torch.softmax(logits / sampling.temperature, dim=-1)
    probs = filter_probs(probs, sampling.top_k, sampling.top_p, sampling.min_p)
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    assert sampling.seed is not None, "a request is given a seed where it enters"
    target = uniform(sampling.seed, state.num_output) * float(cumulative[-1])
    index = int(torch.searchsorted(cumulative, target, right=True))
    return index if index < len(probs) else int(probs.nonzero()[-1])


def filter_probs(probs: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Zero what top-k, then top-p (Holtzman et al., 2019), then min-p leave out; the rest is not renormalised. [V]."""
    num_tokens = probs.shape[-1]
    if 0 < top_k < num_tokens:
        probs = torch.where(probs < torch.topk(probs, top_k).values[-1], 0.0, probs)
    if top_p < 1.0:
        wanted = top_p * float(probs.sum()) if top_k > 0 else top_p
        few = min(_FEW, num_tokens)
        ordered = torch.topk(probs, few).values
        cumulative = ordered.cumsum(-1)
        if float(cumulative[-1]) < wanted and few < num_tokens:
            ordered = torch.sort(probs, descending=True).values
            cumulative = ordered.cumsum(-1)
        last = min(int(torch.searchsorted(cumulative, wanted)), len(ordered) - 1)
        probs = torch.where(probs < ordered[last], 0.0, probs)
    if min_p > 0.0:
        probs = torch.where(probs < min_p * probs.max(), 0.0, probs)
    return probs


def gather_logprobs(logits: Tensor, token_ids: list[int], num_top: list[int]) -> list[TokenLogprobs]:
    """Log probabilities at R positions: the given token first, then the `num_top[r]` most probable ones.

    logits [R, V] float32, raw. The given token appears once more among the top ones when it belongs there.
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, dtype=torch.int64, device=logits.device)[:, None])  # [R, 1]
    ranks = ((logprobs > chosen).sum(-1) + 1).tolist()
    most = max(num_top)
    top_values, top_ids = torch.topk(logprobs, max(most, 1), dim=-1)
    rows = zip(token_ids, chosen[:, 0].tolist(), ranks, top_ids.tolist(), top_values.tolist(), num_top, strict=True)
    return [
        TokenLogprobs([token_id, *ids[:num]], [value, *values[:num]], rank)
        for token_id, value, rank, ids, values, num in rows
    ]
