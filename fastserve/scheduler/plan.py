"""What the scheduler decided for one step, as plain integers, and what the executor made of it: all that passes.

The same plan drives one process, is broadcast to tensor-parallel ranks, and is replayed by the simulator.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from fastserve.core.request import Request, TokenLogprobs


class PlanEntry(msgspec.Struct, frozen=True, gc=False):
    """Work for one sequence in this step.

    Attributes:
        request_id: whose sequence.
        token_ids: ids to run, at positions start .. start + len(token_ids) - 1.
        start: number of tokens already in the cache.
        block_ids: every KV block of the sequence, in order, the ones for these tokens included.
        samples: whether the last of these tokens yields the next one (False inside a chunked prefill).
        request: the request itself, when the executor sees this sequence for the first time (or again after its
            memory was dropped); None afterwards.
        output_ids: with `request`, the tokens made before a preemption; empty for a fresh sequence.
        num_drafts: how many of `token_ids`, the last ones, are guesses to be verified.
    """

    request_id: str
    token_ids: list[int]
    start: int
    block_ids: list[int]
    samples: bool
    request: Request | None = None
    output_ids: list[int] = []
    num_drafts: int = 0


class StepPlan(msgspec.Struct, frozen=True):
    """One step.

    Attributes:
        entries: in execution order.
        copies: (source, target) blocks, copied before the entries run.
        moves: (source, target) between device blocks and tier slots (`~slot`), in this order. Reading a device block is
            over before the entries run; a block that is filled from a slot is reported when it is (StepResult.loaded).
        num_blocks: device blocks that need memory, where that changed; else 0.
        freed: requests whose state may be dropped.
        num_rounds: how often the entries run, each time with what they made, unless an answer ends; 1: not all decode.
    """

    entries: list[PlanEntry]
    copies: list[tuple[int, int]] = []
    moves: list[tuple[int, int]] = []
    num_blocks: int = 0
    freed: list[str] = []
    num_rounds: int = 1

    @property
    def num_tokens(self) -> int:
        return sum(len(entry.token_ids) for entry in self.entries)


@dataclass(slots=True)
class StepResult:
    """What the executor made of a plan.

    Attributes:
        tokens: request id -> sampled token, for entries with `samples`.
        further: request id -> the tokens after that one: of right guesses, or of further rounds.
        num_rounds: how often the plan was run.
        errors: request id -> why the request cannot go on; it has no token.
        logprobs: request id -> its log probabilities, where asked for, and those of beams (their token is not used).
        prompt_logprobs: request id -> log probabilities of prompt tokens start + 1 .. computed in this step.
        loaded: (block, whether it could be read, seconds) for blocks that came from a tier since the last step.
    """

    tokens: dict[str, int]
    logprobs: dict[str, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    loaded: list[tuple[int, bool, float]] = field(default_factory=list)
    further: dict[str, list[int]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    num_rounds: int = 1

    def made(self, request_id: str) -> list[int]:
        """All tokens of a request that can go on."""
        return [self.tokens[request_id], *self.further.get(request_id, ())]
