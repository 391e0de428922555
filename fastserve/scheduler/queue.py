"""The waiting sequences, best rank first, with ranks that may change while they wait.

Nothing is sorted anew in a step: a heap holds (rank, arrival), outdated items are skipped when they surface, and a
second heap holds the times at which policies want to look at a sequence again (a promotion, a deadline). The cost of
a step depends on how many sequences start, stop or come up for review, not on how many wait.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from fastserve.scheduler.policy import Rank
from fastserve.scheduler.sequence import Sequence


class Ranked(NamedTuple):
    """A sequence and its place in the order of service; compares by rank, then arrival."""

    rank: Rank
    arrival_order: int
    version: int
    sequence: Sequence


class WaitingQueue:
    """Args: `place` gives a sequence's rank at a time, and when that rank is to be taken again (inf: never)."""

    def __init__(self, place: Callable[[Sequence, float], tuple[Rank, float]]) -> None:
        self._place = place
        self._heap: list[Ranked] = []
        self._reviews: list[tuple[float, Ranked]] = []
        self._current: dict[str, Ranked] = {}
        self._version = 0

    def __len__(self) -> int:
        return len(self._current)

    def push(self, sequence: Sequence, now: float) -> None:
        """Take in a sequence that is not here yet."""
        assert sequence.request_id not in self._current
        self._insert(sequence, now)

    def discard(self, sequence: Sequence) -> None:
        """Forget a sequence, here or not."""
        self._current.pop(sequence.request_id, None)
        if len(self._heap) > 2 * len(self._current) + 64:
            self._heap = list(self._current.values())
            heapq.heapify(self._heap)

    def review(self, now: float) -> None:
        """Take anew the ranks whose time has come."""
        reviews = self._reviews
        while reviews and reviews[0][0] <= now:
            _, item = heapq.heappop(reviews)
            if self._is_current(item):
                self._insert(item.sequence, now)

    def first(self) -> Ranked | None:
        """The best item, left where it is."""
        heap = self._heap
        while heap and not self._is_current(heap[0]):
            heapq.heappop(heap)
        return heap[0] if heap else None

    def pop(self) -> Ranked:
        """Take the best item out. There must be one."""
        item = self.first()
        assert item is not None
        heapq.heappop(self._heap)
        del self._current[item.sequence.request_id]
        return item

    def put_back(self, items: Iterable[Ranked]) -> None:
        """Return popped items with the ranks they had."""
        for item in items:
            self._current[item.sequence.request_id] = item
            heapq.heappush(self._heap, item)

    def get(self, request_id: str) -> Ranked | None:
        """The item of a waiting sequence."""
        return self._current.get(request_id)

    def _is_current(self, item: Ranked) -> bool:
        return self._current.get(item.sequence.request_id) is item

    def _insert(self, sequence: Sequence, now: float) -> None:
        rank, review_time = self._place(sequence, now)
        self._version += 1
        item = Ranked(rank, sequence.arrival_order, self._version, sequence)
        self._current[sequence.request_id] = item
        heapq.heappush(self._heap, item)
        if review_time < math.inf:
            heapq.heappush(self._reviews, (max(review_time, math.nextafter(now, math.inf)), item))
