"""Equal service to tenants under load: the virtual token counter (VTC, arXiv 2401.00588).

Each tenant has a counter of the service it got: uncached prompt tokens when one of its requests starts, and twice the
output tokens as they are made. The waiting tenant with the smallest counter goes next, its requests in order of
arrival. A tenant that was away comes back at the smallest counter of those who are here: absence earns no credit. The
gap between two tenants that both have requests waiting stays within 2 * max(longest prompt, output weight * tokens of
a full batch), and no place stays empty for fairness' sake.
"""

from __future__ import annotations

from fastserve.scheduler.policy import FCFS, PolicyContext
from fastserve.scheduler.sequence import Sequence

PROMPT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0


class VirtualTokenCounter(FCFS):
    """Fair among tenants. Does not preempt."""

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self.counters: dict[str, float] = {}
        self._num_live: dict[str, int] = {}
        self._floor = 0.0

    def on_arrival(self, sequence: Sequence, now: float) -> None:
        tenant = sequence.request.tenant
        if tenant not in self._num_live:
            floor = min((self.counters[name] for name in self._num_live), default=self._floor)
            self.counters[tenant] = max(self.counters.get(tenant, 0.0), floor)
            self._num_live[tenant] = 0
        self._num_live[tenant] += 1

    def lane(self, sequence: Sequence) -> str:
        return sequence.request.tenant

    def lane_rank(self, lane: str, first: Sequence, now: float) -> float:
        return self.counters[lane]

    def on_start(self, sequence: Sequence, now: float) -> None:
        self.counters[sequence.request.tenant] += PROMPT_WEIGHT * sequence.num_remaining

    def on_service(self, sequence: Sequence, num_tokens: int, seconds: float, now: float) -> None:
        if sequence.num_computed >= sequence.num_prompt:  # this step makes a token
            self.counters[sequence.request.tenant] += OUTPUT_WEIGHT

    def on_finish(self, sequence: Sequence) -> None:
        tenant = sequence.request.tenant
        self._num_live[tenant] -= 1
        if self._num_live[tenant] == 0:
            del self._num_live[tenant]
            self._floor = max(self._floor, self.counters[tenant])
            if not self._num_live:
                self.counters.clear()  # nobody is owed anything: tenants that never return leave nothing behind
                self._floor = 0.0
