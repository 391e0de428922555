"""When will a waiting sequence be served next? The estimate by which keys and values are moved ahead of time.

ENST = min(time to promotion, time until those in front have had their quanta), FastServe (arXiv 2305.05920, section
4.2). The largest gives up its memory first, the smallest gets it back first.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from itertools import accumulate

from fastserve.scheduler.policy import SchedulingPolicy
from fastserve.scheduler.queue import Ranked


def order_by_next_turn(
    candidates: Iterable[Ranked], ahead: Iterable[Ranked], policy: SchedulingPolicy, num_places: int, now: float
) -> list[Ranked]:
    """Those of `candidates` that are served soonest first; equal estimates in the policy's order.

    Args:
        ahead: every sequence that competes for a place, the candidates among them or not.
        num_places: sequences served at a time.
    """
    levels = sorted(policy.service_before(item.sequence) for item in ahead)
    sums = [0.0, *accumulate(levels)]

    def estimate(item: Ranked) -> tuple[float, Ranked]:
        own = policy.service_before(item.sequence)
        num_before = bisect.bisect_left(levels, own)
        until_served = (own * num_before - sums[num_before]) / num_places
        return min(policy.review_time(item.sequence, now) - now, until_served), item

    return [item for _, item in sorted(map(estimate, candidates))]
