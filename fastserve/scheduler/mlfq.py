"""Skip-join multi-level feedback queue (FastServe, arXiv 2305.05920, section 4.1): fair to short answers, blindly.

Quanta double from level to level. A new sequence joins the first level whose quantum holds its first iteration (the
prefill of what the prefix cache lacks), sinks when it has used up its level's quantum, and returns to the top when it
has waited alpha. It is charged its own share of each step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastserve.scheduler.policy import FCFS, PolicyContext, Rank
from fastserve.scheduler.sequence import Sequence, Status


@dataclass(slots=True)
class _Place:
    level: int
    used: float  # seconds of service in this level
    since: float  # arrival or last service


class SkipJoinMLFQ(FCFS):
    """Args: `alpha`, seconds of waiting after which a sequence is promoted; `num_levels`."""

    preemptive = True
    uses_cost = True

    def __init__(self, context: PolicyContext, alpha: float = 0.3, num_levels: int = 24) -> None:
        super().__init__(context)
        self.alpha = alpha
        self._last_level = num_levels - 1
        self._first_quantum = context.cost.first_iteration_seconds(1)  # twice as many seconds in each level
        self.places: dict[str, _Place] = {}

    def on_arrival(self, sequence: Sequence, now: float) -> None:
        self._first_quantum = self._context.cost.first_iteration_seconds(1)
        first = self._context.cost.first_iteration_seconds(sequence.num_uncached)
        level = max(0, math.ceil(math.log2(first / self._first_quantum) - 1e-9))
        self.places[sequence.request_id] = _Place(min(level, self._last_level), 0.0, now)

    def rank(self, sequence: Sequence, now: float) -> Rank:
        place = self.places[sequence.request_id]
        if place.level > 0 and now - place.since >= self.alpha and sequence.status is Status.WAITING:
            place.level, place.used = 0, 0.0
        return (place.level,)

    def review_time(self, sequence: Sequence, now: float) -> float:
        place = self.places[sequence.request_id]
        return place.since + self.alpha if place.level > 0 else math.inf

    def service_before(self, sequence: Sequence) -> float:
        return self._first_quantum * ((1 << self.places[sequence.request_id].level) - 1)

    def on_service(self, sequence: Sequence, num_tokens: int, seconds: float, now: float) -> None:
        place = self.places[sequence.request_id]
        place.used += seconds
        place.since = now
        if place.used > self._first_quantum * (1 << place.level) and place.level < self._last_level:
            place.level += 1
            place.used = 0.0

    def on_finish(self, sequence: Sequence) -> None:
        del self.places[sequence.request_id]
