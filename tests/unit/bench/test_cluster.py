"""Routers, and many replicas on virtual clocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastserve.bench import cluster
from fastserve.bench.simulate import Machine, Replica, make_requests, simulate
from fastserve.bench.traces import Trace, TraceRequest, heavy_tailed
from fastserve.core.errors import ConfigError
from fastserve.scheduler.cost import Coefficients

MACHINE = Machine(Coefficients(0.01, 0.001, 0.002), 2, 64, 256, 64, is_known=True)


def replicas(count: int, machine: Machine = MACHINE) -> list[Replica]:
    return [Replica(machine, "fcfs", machine.num_blocks) for _ in range(count)]


def test_one_replica_behind_a_router_is_the_plain_simulation() -> None:
    trace = Trace("t", tuple(TraceRequest(index * 0.07, 20, 5 + index % 9) for index in range(30)), True)
    machine = replace(MACHINE, prefix_caching=False)
    times = cluster.serve(iter(trace.requests), replicas(1, machine), cluster.make_router("least-loaded"))
    assert times == simulate(make_requests(trace), machine, "fcfs").times


def test_least_loaded_avoids_the_busy_replica() -> None:
    """Every second request is long: round robin sends them all to one replica."""
    items = [TraceRequest(index * 0.3, 10, 100 if index % 2 else 2) for index in range(40)]
    mean = {}
    for router in ("round-robin", "least-loaded"):
        times = cluster.serve(iter(items), replicas(2), cluster.make_router(router))
        mean[router] = sum(item.ttft for item in times) / len(times)
    assert mean["least-loaded"] < mean["round-robin"] / 1.5


def test_prefix_aware_finds_more_in_the_caches_but_not_at_any_price() -> None:
    items = [TraceRequest(index * 0.2, 80, 2, prefix_hashes=(index * 7 % 3,), hash_tokens=64) for index in range(60)]
    cached = {}
    for router in ("round-robin", "prefix-aware"):
        group = replicas(4)
        cluster.serve(iter(items), group, cluster.make_router(router))
        cached[router] = sum(replica.run.num_cached_tokens for replica in group)
    assert cached["prefix-aware"] > cached["round-robin"]
    burst = [TraceRequest(0.0, 80, 50, prefix_hashes=(1,), hash_tokens=64) for _ in range(60)]
    group = replicas(4)
    route = cluster.make_router("prefix-aware")
    chosen = []
    for index, item in enumerate(burst):
        chosen.append(route(item, group))
        group[chosen[-1]].add(cluster._request(item, index))
    assert len(set(chosen)) == 4  # one hot prefix does not end on one replica


def test_a_short_trace_is_repeated_at_the_same_rate(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,client_id,input_tokens,output_tokens\n" + "".join(f"{i},c,20,8\n" for i in range(30)))
    report = cluster.run(str(path), num_requests=200, num_replicas=3, load=0.5, machine=MACHINE)
    config, metrics = report["config"], report["metrics"]
    assert metrics["requests_per_s"] == pytest.approx(config["requests_per_s"], rel=0.05)
    assert metrics["simulated_requests_per_s"] > 0
    assert (config["num_blocks"], config["context"], config["coefficients"]["decode"]) == (64, 256, 0.002)
    with pytest.raises(ConfigError, match="router must be"):
        cluster.run(str(path), num_requests=200, router="random", machine=MACHINE)


def test_heavy_tailed_answers_are_mostly_short_and_mostly_long_work() -> None:
    lengths = sorted(item.num_output for item in heavy_tailed(2000).requests)
    assert lengths[1800] < 40
    assert sum(lengths[1800:]) > 0.8 * sum(lengths)
