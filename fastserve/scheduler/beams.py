"""Beam search: which of several sequences live on, and the answers that are kept. Numbers only, no model and no memory.

Sutskever et al. (2014), with the choices of transformers' `generate` (length penalty, early stopping), so that tokens
and scores are the same. The scheduler computes a search's beams as sequences that share KV blocks (`BeamGroup`).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from heapq import nlargest

import msgspec

from fastserve.core.request import FINISH_LENGTH, FINISH_STOP, Beam, TokenLogprobs, TokenOutput
from fastserve.core.sampling_params import SamplingParams
from fastserve.scheduler.block_pool import BlockPool
from fastserve.scheduler.sequence import Sequence


def num_candidates(num_beams: int, num_end_ids: int) -> int:
    """Most probable next tokens of each beam that a search must see: enough are left when all others end it."""
    return max(2, 1 + num_end_ids) * num_beams


class BeamSearch:
    """The search for one answer.

    Args:
        sampling: num_beams, length_penalty, early_stopping, n.
        end_ids: tokens that end an answer.
        max_tokens: longest answer.
        num_before: tokens of the prompt that count as the answer's when its score is made.
    """

    def __init__(self, sampling: SamplingParams, end_ids: frozenset[int], max_tokens: int, num_before: int = 0) -> None:
        self._num_beams = sampling.num_beams
        self._length_penalty = sampling.length_penalty
        self._early_stopping = sampling.early_stopping
        self._num_answers = sampling.n
        self._end_ids = end_ids
        self._max_tokens = max_tokens
        self._num_before = num_before
        self._forced_id = sampling.forced_eos_token_id
        self._beams: list[tuple[float, list[int]]] = [(0.0, [])]  # sum of log probabilities, tokens; the best first
        self._finished: list[Beam] = []  # the best first

    def advance(self, candidates: SequenceOf[TokenLogprobs]) -> list[tuple[int, int]]:
        """Take in each beam's most probable next tokens (the first that is listed does not count), in their order.

        Returns (which beam, its next token) of those that go on, the best first: the new beams. None when it is over.
        """
        length = len(self._beams[0][1]) + 1
        extended = [
            (score + value, beam, token_id)
            for beam, ((score, _), found) in enumerate(zip(self._beams, candidates, strict=True))
            for token_id, value in zip(found.token_ids[1:], found.logprobs[1:], strict=True)
        ]
        if length == self._max_tokens and self._forced_id is not None:
            extended = [(score, beam, self._forced_id) for beam, (score, _) in enumerate(self._beams)]
        best = nlargest(num_candidates(self._num_beams, len(self._end_ids)), extended, key=lambda item: item[0])
        going_on: list[tuple[float, int, int]] = []
        for place, (score, beam, token_id) in enumerate(best):
            is_end = token_id in self._end_ids
            if not is_end and length < self._max_tokens:
                going_on.append((score, beam, token_id))
            elif place < self._num_beams:  # the others are only there to go on with
                tokens = [*self._beams[beam][1], token_id]
                reason = FINISH_STOP if is_end else FINISH_LENGTH
                self._finished.append(
                    Beam(tokens, self._penalised(score, length), reason, token_id if is_end else None)
                )
        self._finished = nlargest(self._num_beams, self._finished, key=lambda beam: beam.score)
        going_on = going_on[: self._num_beams]
        if not going_on or self._is_over(going_on[0][0], length):
            return []
        self._beams = [(score, [*self._beams[beam][1], token_id]) for score, beam, token_id in going_on]
        return [(beam, token_id) for _, beam, token_id in going_on]

    def answers(self) -> list[Beam]:
        """The n best that ended, the best first."""
        return self._finished[: self._num_answers]

    def _is_over(self, best_score: float, length: int) -> bool:
        """Whether nothing better is to be expected (False), is possible ("never"), or is asked for (True)."""
        if len(self._finished) < self._num_beams:
            return False
        if self._early_stopping is True:
            return True
        reaches_end = self._early_stopping == "never" and self._length_penalty > 0.0
        hoped = self._penalised(best_score, self._max_tokens if reaches_end else length)
        return hoped <= self._finished[-1].score

    def _penalised(self, score: float, length: int) -> float:
        return float(score / (length + self._num_before) ** self._length_penalty)


@dataclass(slots=True, eq=False)
class BeamGroup:
    """The sequences of one search, in the order of its beams, and what each of them found for its next token.

    Attributes:
        request_id: of the search, and of the sequence that it began with.
        candidates: by the member's own request id.
        num_made: sequences so far.
    """

    request_id: str
    search: BeamSearch
    members: list[Sequence]
    candidates: dict[str, TokenLogprobs] = field(default_factory=dict)
    num_made: int = 1

    @property
    def is_complete(self) -> bool:
        return len(self.candidates) == len(self.members)

    def advance(self) -> list[tuple[int, int]]:
        """`BeamSearch.advance` with what was found; the new beams are to be found anew."""
        found = [self.candidates[member.request_id] for member in self.members]
        self.candidates = {}
        return self.search.advance(found)

    def fork(self, kept: SequenceOf[tuple[int, int]], pool: BlockPool, arrive: Callable[[Sequence], None]) -> None:
        """Make the members the new beams: an old beam that goes on keeps its sequence, one that goes on twice gets that
        of one that does not, or a new one, for which `arrive` is called."""
        old, first_of = self.members, {parent: place for place, (parent, _) in reversed([*enumerate(kept)])}
        spare = [member for index, member in enumerate(old) if index not in first_of]
        self.members = []
        for place, (parent, _) in enumerate(kept):
            member = old[parent]
            if first_of[parent] != place:
                member = spare.pop() if spare else self._new_member(arrive)
                pool.free(member.block_ids)
                member.take_over(old[parent])
                pool.share(member.block_ids)
            self.members.append(member)
        assert not spare, "a search that goes on has all its beams"
        for member, (_, token_id) in zip(self.members, kept, strict=True):
            member.token_ids.append(token_id)

    def output(self) -> TokenOutput:
        """What the search found."""
        answers, first = self.search.answers(), self.members[0]
        return TokenOutput(
            self.request_id,
            [],
            answers[0].finish_reason,
            num_cached_tokens=first.num_cached_tokens,
            scheduled_time=first.scheduled_time or 0.0,
            beams=answers,
        )

    def _new_member(self, arrive: Callable[[Sequence], None]) -> Sequence:
        first = self.members[0]  # the best beam went on in its own
        request = msgspec.structs.replace(first.request, request_id=f"{self.request_id}+beam-{self.num_made}")
        order = int(first.arrival_order) + self.num_made / 1024  # behind each other, before the next request
        self.num_made += 1
        member = Sequence.from_request(request, order)
        member.group, member.scheduled_time = self, first.scheduled_time
        member.first_token_time, member.num_cached_tokens = first.first_token_time, first.num_cached_tokens
        arrive(member)
        return member
