"""One sequence in the scheduler: its tokens, how many are computed, which blocks hold them.

`status` (what it is doing) and `residency` (where its keys and values are) are separate; only Scheduler writes either.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastserve.core.request import Request, TokenLogprobs

if TYPE_CHECKING:
    from fastserve.scheduler.beams import BeamGroup


class Status(enum.Enum):
    """WAITING sequences may still hold blocks (paused); RUNNING ones took part in the last step or will in the next."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Residency(enum.Enum):
    """Where the keys and values of the computed tokens are.

    NONE: in no block of its own; the prefix cache and the tiers may have them still. LOADING: in its own blocks when
    what is on the way from a tier has arrived.
    """

    NONE = "none"
    LOADING = "loading"
    DEVICE = "device"


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one request while it is live.

    Attributes:
        arrival_order: breaks ties of rank; kept over preemptions.
        token_ids: prompt and output ids so far.
        num_computed: leading tokens whose keys and values are in blocks.
        block_ids: blocks held, in order of position.
        block_hashes: prefix hashes of the leading full blocks, as far as computed.
        num_published: leading blocks already offered to the prefix cache.
        is_known: the executor holds this sequence's request (so plans need not send it).
        num_cached_expected: leading tokens that the prefix cache or a tier held when it arrived or lost its memory.
        num_lost: tokens that were computed when it lost its memory.
        num_cached_tokens: prompt tokens found in the prefix cache at the first admission.
        scheduled_time, first_token_time: monotonic seconds, None until then.
        prompt_logprobs: of the prompt so far, for requests that ask for them; the first token has none.
        group: the beam search that it is a beam of.
        end_ids: tokens that end its answer; max_length: tokens at which it ends in any case.
        served: seconds of steps that were its share since it got its memory.
        rank_until: while it decodes, the number of tokens at which its rank is to be taken again.
        num_together: leading tokens that one step computes together: an encoder's, up to the end of their last block.
    """

    request: Request
    token_ids: list[int]
    num_prompt: int
    arrival_order: float = 0
    num_computed: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_published: int = 0
    status: Status = Status.WAITING
    residency: Residency = Residency.NONE
    is_known: bool = False
    num_preemptions: int = 0
    num_cached_expected: int = 0
    num_lost: int = 0
    num_cached_tokens: int = 0
    scheduled_time: float | None = None
    first_token_time: float | None = None
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    group: BeamGroup | None = None
    num_together: int = 0
    end_ids: frozenset[int] = frozenset()
    max_length: int = 0
    rank_until: float = 0
    served: float = 0.0

    request_id: str = field(init=False)

    def __post_init__(self) -> None:
        self.request_id = self.request.request_id

    @classmethod
    def from_request(cls, request: Request, arrival_order: float) -> Sequence:
        return cls(request, list(request.prompt_ids), len(request.prompt_ids), arrival_order)

    def take_over(self, other: Sequence) -> None:
        """Become another beam of the same search: its tokens, and its blocks where it has some."""
        self.token_ids, self.num_computed = other.token_ids[:], other.num_computed
        self.block_ids, self.block_hashes = other.block_ids[:], other.block_hashes[:]
        self.num_published, self.residency = other.num_published, other.residency
        self.num_together = other.num_together
        self.num_lost, self.num_cached_expected, self.is_known = other.num_lost, other.num_cached_expected, False

    @property
    def is_decoding(self) -> bool:
        """One token is left to compute before the next can be sampled."""
        return len(self.token_ids) - self.num_computed == 1

    @property
    def num_remaining(self) -> int:
        """Tokens to compute before the next one can be sampled; 1 while decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_uncached(self) -> int:
        """Tokens to compute before the next one can be sampled, less those the prefix cache is expected to give."""
        if self.residency is not Residency.DEVICE:
            return max(1, len(self.token_ids) - self.num_cached_expected)
        return len(self.token_ids) - self.num_computed

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def output_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]
