"""What no order of service can beat, so that a policy's figures can be read against what is possible."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from fastserve.bench.simulate import Machine
from fastserve.core.request import Request
from fastserve.scheduler.block_pool import hash_block


def least_mean_ttft(requests: Iterable[Request], machine: Machine) -> float:
    """Seconds below which no policy brings the mean time to first token, whatever it does to answers.

    Prefills alone, in pieces of any size: on one machine the shortest remaining one first has the least mean (Schrage,
    1968). A block of tokens that several prompts begin with is computed once, by the first that arrives. Decoding
    takes no time, and of a step's fixed time each request pays one.
    """
    size, cost = machine.block_size, machine.coefficients
    known: set[bytes] = set()
    jobs: list[tuple[float, float]] = []  # arrival, seconds
    for request in sorted(requests, key=lambda request: request.arrival_time):
        prompt, parent, num_tokens = request.prompt_ids, b"", len(request.prompt_ids)
        for start in range(0, (len(prompt) - 1) // size * size if machine.prefix_caching else 0, size):
            parent = hash_block(parent, prompt[start : start + size])
            num_tokens -= size * (parent in known)
            known.add(parent)
        jobs.append((request.arrival_time, cost.prefill_token * num_tokens))
    return cost.step + _shortest_remaining_first(jobs)


def _shortest_remaining_first(jobs: list[tuple[float, float]]) -> float:
    """Mean time from arrival to end of jobs, given by (arrival, seconds) in order of arrival, on one machine."""
    now = total = 0.0
    waiting: list[tuple[float, float]] = []  # what is left, arrival
    for place, (arrival, seconds) in enumerate(jobs):
        now = max(now, arrival)
        heapq.heappush(waiting, (seconds, arrival))
        until = jobs[place + 1][0] if place + 1 < len(jobs) else float("inf")
        while waiting and now < until:
            left, came = heapq.heappop(waiting)
            if now + left > until:
                heapq.heappush(waiting, (left - (until - now), came))
                now = until
            else:
                now += left
                total += now - came
    return total / len(jobs)
