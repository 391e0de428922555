"""Simulate many replicas behind a router: which replica gets a request, and what that does to its latency.

Every replica is an engine's own Scheduler on a virtual clock (see `simulate`); the router sees what a router in front
of servers sees: how much it has sent where and what came back, and which prompt beginnings went where. A trace shorter
than the run is repeated. Prompts of traces without prefix hashes are all zeros, so their prefix caching is off.
"""

from __future__ import annotations

import functools
import heapq
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from fastserve.bench.latencies import RequestTimes, summarise
from fastserve.bench.report import Report, rounded
from fastserve.bench.simulate import Machine, Replica, capacity
from fastserve.bench.traces import Trace, TraceRequest, prompt_ids, read_trace
from fastserve.core.errors import ConfigError
from fastserve.core.request import Request
from fastserve.core.sampling_params import SamplingParams

ROUTERS = ("round-robin", "least-loaded", "prefix-aware")
_REMEMBERED = 200_000  # prompt beginnings that a prefix-aware router keeps
_CALIBRATED_WITH = 300  # requests of the trace that the capacity of one replica is measured with

Router = Callable[[TraceRequest, Sequence[Replica]], int]


def make_router(name: str) -> Router:
    """A router by name: it returns a replica's index.

    Raises:
        ConfigError: no such router.
    """
    if name == "round-robin":
        return _RoundRobin()
    if name == "least-loaded":
        return _least_loaded
    if name == "prefix-aware":
        return _PrefixAware()
    raise ConfigError(f"router must be {', '.join(ROUTERS)}, not {name!r}")


class _RoundRobin:
    def __init__(self) -> None:
        self._next = -1

    def __call__(self, request: TraceRequest, replicas: Sequence[Replica]) -> int:
        self._next = (self._next + 1) % len(replicas)
        return self._next


def _least_loaded(request: TraceRequest, replicas: Sequence[Replica]) -> int:
    """Fewest unfinished requests; the first of equals."""
    loads = [replica.num_live for replica in replicas]
    return loads.index(min(loads))


class _PrefixAware:
    """Where the longest known beginning of the prompt went last, unless that replica has far more to do than the least
    loaded one."""

    def __init__(self, imbalance: int = 8) -> None:
        self._imbalance = imbalance
        self._seen: dict[tuple[int, ...], int] = {}

    def __call__(self, request: TraceRequest, replicas: Sequence[Replica]) -> int:
        chosen = _least_loaded(request, replicas)
        hashes = request.prefix_hashes
        for length in range(len(hashes), 0, -1):
            known = self._seen.get(hashes[:length])
            if known is not None:
                if replicas[known].num_live <= replicas[chosen].num_live + self._imbalance:
                    chosen = known
                break
        for length in range(1, len(hashes) + 1):
            self._seen[hashes[:length]] = chosen
        while len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]
        return chosen


def run(
    trace: str,
    *,
    num_requests: int,
    num_replicas: int = 1,
    router: str = "round-robin",
    scheduler: str = "fcfs",
    load: float = 0.9,
    offset: int = 0,
    machine: Machine | None = None,
    coasting: bool = True,
) -> dict[str, Any]:
    """Simulate a cluster on a trace and return the report.

    Args:
        num_requests: as many; the trace is repeated if it has fewer.
        load: share of the capacity of all replicas, measured with FCFS on one of them and the trace's beginning.

    Metrics: `latencies.summarise` over all requests, `cached_tokens`, and `simulated_requests_per_s` (wall clock).

    Raises:
        ConfigError: the trace cannot be read, no such router or policy, or a number that is not positive.
    """
    if not 0 < load < math.inf or num_replicas < 1 or num_requests < 2:
        raise ConfigError("load must be above 0, replicas at least 1, requests at least 2")
    whole = read_trace(trace, 0, offset)
    machine = replace(machine or Machine(), is_known=True, prefix_caching=bool(whole.requests[0].prefix_hashes))
    fitted = whole.fit(machine.context)
    machine = replace(machine, num_blocks=machine.num_blocks or _default_blocks(machine))
    first = replace(fitted, requests=fitted.requests[:_CALIBRATED_WITH])
    rate = load * num_replicas * capacity(first, machine)
    arrivals = _repeat(fitted.at_rate(rate), num_requests)
    began = time.perf_counter()
    replicas = [Replica(machine, scheduler, machine.num_blocks, coasting) for _ in range(num_replicas)]
    times = serve(arrivals, replicas, make_router(router))
    wall_seconds = time.perf_counter() - began
    report = Report("simulate", {"trace": fitted.name, "num_requests": num_requests, "offset": offset, "load": load})
    report.config.update(
        num_replicas=num_replicas,
        router=router,
        scheduler=scheduler,
        requests_per_s=rounded(rate),
        length_scale=fitted.length_scale,
        wall_seconds=rounded(wall_seconds),
        num_steps=sum(replica.run.num_steps for replica in replicas),
        **asdict(machine),
    )
    report.metrics.update(summarise(times))
    report.metrics["cached_tokens"] = sum(replica.run.num_cached_tokens for replica in replicas)
    report.metrics["preemptions"] = sum(replica.run.num_preemptions for replica in replicas)
    report.metrics["simulated_requests_per_s"] = rounded(num_requests / wall_seconds)
    return report.as_dict()


def serve(arrivals: Iterator[TraceRequest], replicas: Sequence[Replica], route: Router) -> list[RequestTimes]:
    """Send every request where `route` says, at its arrival; returns their times in order of arrival.

    Routers see how much is unfinished where. So a replica is brought up to date only when somebody may have finished
    there before an arrival, or when it gets one: on a heap are the earliest such times, and outdated ones.
    """
    times: list[RequestTimes] = []
    due = [math.inf] * len(replicas)
    behind: list[tuple[float, int]] = []

    def watch(which: int) -> None:
        due[which] = replicas[which].quiet_until if replicas[which].num_live else math.inf
        heapq.heappush(behind, (due[which], which))

    for index, item in enumerate(arrivals):
        while behind and behind[0][0] < item.arrival:
            at, which = heapq.heappop(behind)
            if at == due[which]:
                replicas[which].advance(item.arrival)
                watch(which)
        which = route(item, replicas)
        replicas[which].advance(item.arrival)
        times.append(replicas[which].add(_request(item, index)))
        watch(which)
    for replica in replicas:
        replica.finish()
    return times


def _repeat(trace: Trace, num_requests: int) -> Iterator[TraceRequest]:
    """The trace's requests over and over, each round after the other at the same rate."""
    span = trace.requests[-1].arrival + 1.0 / trace.requests_per_second
    for index in range(num_requests):
        round_number, place = divmod(index, len(trace.requests))
        item = trace.requests[place]
        yield replace(item, arrival=item.arrival + round_number * span)


def _request(item: TraceRequest, index: int) -> Request:
    token_ids = _shared_prompt(replace(item, arrival=0.0)) if item.prefix_hashes else [0] * item.num_prompt
    sampling = SamplingParams(max_tokens=item.num_output, ignore_eos=True, seed=0)
    return Request(str(index), token_ids, sampling, item.arrival, tenant=item.tenant)


@functools.lru_cache(maxsize=4096)
def _shared_prompt(item: TraceRequest) -> list[int]:
    return prompt_ids(item, 0, 32_000)


def _default_blocks(machine: Machine) -> int:
    """Room for twice a full batch of the longest sequences."""
    return 2 * machine.max_batch_sequences * -(-machine.context // machine.block_size)
