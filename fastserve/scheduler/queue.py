"""The waiting sequences, best rank first, with ranks that may change while they wait.

Nothing is sorted anew in a step: a heap per lane holds (rank, arrival), outdated items are skipped when they surface,
and one more heap holds the times at which the policy wants to look at a sequence again (a promotion, say). The cost
of a step depends on how many sequences start, stop or come up for review and on the number of lanes, not on how many
wait.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

from fastserve.scheduler.policy import Rank, SchedulingPolicy
from fastserve.scheduler.sequence import Sequence


class Ranked(NamedTuple):
    """A sequence and its place in the order of service; compares by rank, then arrival."""

    rank: Rank
    arrival_order: float
    version: int
    sequence: Sequence


class WaitingQueue:
    """Args: `policy` gives ranks, lanes, and the times at which ranks are taken again."""

    def __init__(self, policy: SchedulingPolicy) -> None:
        self._policy = policy
        self._lanes: dict[str, list[Ranked]] = {}
        self._reviews: list[tuple[float, Ranked]] = []
        self._current: dict[str, Ranked] = {}
        self._version = 0

    def __len__(self) -> int:
        return len(self._current)

    @property
    def next_review(self) -> float:
        """When `review` may next change a rank; inf for never. Outdated reviews count: too early does no harm."""
        return self._reviews[0][0] if self._reviews else math.inf

    def push(self, sequence: Sequence, now: float) -> None:
        """Take in a sequence that is not here yet."""
        assert sequence.request_id not in self._current
        self._insert(sequence, now)

    def discard(self, sequence: Sequence) -> None:
        """Take a sequence out, here or not. Its item stays in the heap until it surfaces."""
        self._current.pop(sequence.request_id, None)

    def review(self, now: float) -> None:
        """Take anew the ranks whose time has come."""
        reviews = self._reviews
        while reviews and reviews[0][0] <= now:
            _, item = heapq.heappop(reviews)
            if self._is_current(item):
                self._insert(item.sequence, now)

    def first(self, now: float) -> Ranked | None:
        """The best item, left where it is."""
        best: Ranked | None = None
        best_rank = math.inf
        current = self._current
        for name, heap in [*self._lanes.items()]:
            while heap and current.get(heap[0].sequence.request_id) is not heap[0]:
                heapq.heappop(heap)
            if not heap:
                del self._lanes[name]
            elif len(self._lanes) == 1:
                return heap[0]
            else:
                rank = self._policy.lane_rank(name, heap[0].sequence, now)
                if best is None or (rank, heap[0]) < (best_rank, best):
                    best, best_rank = heap[0], rank
        return best

    def last(self) -> Ranked | None:
        """The worst item, by looking at all of them."""
        return max(self._current.values(), default=None)

    def items(self, request_ids: Iterable[str] | None = None) -> Iterable[Ranked]:
        """All of them, or those named (all here), in no order."""
        return self._current.values() if request_ids is None else (self._current[name] for name in request_ids)

    def _is_current(self, item: Ranked) -> bool:
        return self._current.get(item.sequence.request_id) is item

    def _add(self, item: Ranked) -> None:
        self._current[item.sequence.request_id] = item
        heap = self._lanes.setdefault(self._policy.lane(item.sequence), [])
        heapq.heappush(heap, item)
        if len(heap) > 2 * len(self._current) + 64:  # most of it is outdated
            heap[:] = [kept for kept in heap if self._is_current(kept)]
            heapq.heapify(heap)

    def _insert(self, sequence: Sequence, now: float) -> None:
        self._version += 1
        item = Ranked(self._policy.rank(sequence, now), sequence.arrival_order, self._version, sequence)
        self._add(item)
        review_time = self._policy.review_time(sequence, now)
        if review_time < math.inf:
            heapq.heappush(self._reviews, (max(review_time, math.nextafter(now, math.inf)), item))


def order_by_next_turn(
    candidates: Iterable[Ranked], ahead: Iterable[Ranked], policy: SchedulingPolicy, num_places: int, now: float
) -> list[Ranked]:
    """`candidates`, those that are served soonest first; equal estimates in the policy's order.

    ENST = min(time to promotion, time until those in front have had their quanta), FastServe (arXiv 2305.05920, section
    4.2). ahead: every sequence that competes for one of the `num_places`, the candidates among them or not.
    """
    levels = sorted(policy.service_before(item.sequence) for item in ahead)
    sums = [0.0, *accumulate(levels)]

    def estimate(item: Ranked) -> tuple[float, Ranked]:
        own = policy.service_before(item.sequence)
        num_before = bisect.bisect_left(levels, own)
        until_served = (own * num_before - sums[num_before]) / num_places
        return min(policy.review_time(item.sequence, now) - now, until_served), item

    return [item for _, item in sorted(map(estimate, candidates))]
