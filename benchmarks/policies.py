"""Scheduling policies side by side on the real engine, on a request trace at a share of capacity.

    python benchmarks/policies.py --trace ../shared/data/traces/azure_llm_2023_conv.csv --load 0.9
    python benchmarks/policies.py --requests 60 --policies aged-srpt       # a first look

Random weights of the llama-0.1b shape, bfloat16, at most 16 sequences in a step; prompts and outputs are scaled by one
factor to a context of 1,024, so that 300 requests take about a minute. One engine per policy, all in this process: the
one furthest behind in the trace works next, for a quarter of a second, on a clock that stands still for the others.
Capacity is measured first, with FCFS and everything there at the start. Without --trace, the Azure conversations of the
shared data are used, if they are there.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import msgspec
from shared_data import add_trace_options

from fastserve.bench import policies, random_model
from fastserve.bench.latencies import Limits, RequestTimes, saturated_rate, summarise
from fastserve.bench.replay import OwnClock, Replay, side_by_side
from fastserve.bench.report import Report, emit, measure_limits, rounded
from fastserve.bench.simulate import make_requests
from fastserve.bench.traces import read_trace
from fastserve.core.config import EngineConfig
from fastserve.core.request import Request
from fastserve.scheduler.policy import POLICY_NAMES

VOCAB_SIZE = 8000
MAX_BATCH_SEQUENCES = 16


def serve(
    options: dict[str, Any], names: list[str], requests: list[Request]
) -> dict[str, tuple[list[RequestTimes], dict[str, float]]]:
    """The requests with each policy, on engines that take turns: times, and what the engine counted."""
    from fastserve.engine.engine import Engine

    clocks = [OwnClock() for _ in names]
    engines = [
        Engine(EngineConfig(**options, scheduler=name), clock) for name, clock in zip(names, clocks, strict=True)
    ]
    replays = [Replay(engine, clock, requests) for engine, clock in zip(engines, clocks, strict=True)]
    side_by_side(replays)
    results: dict[str, tuple[list[RequestTimes], dict[str, float]]] = {}
    for name, engine, replay in zip(names, engines, replays, strict=True):
        stats = engine.stats()
        counts = {"preemptions": float(stats.num_preemptions), "cached_tokens": float(stats.prefix_cache_hits)}
        results[name] = (replay.times, counts)
        engine.close()
    return results


def serve_alone(options: dict[str, Any], requests: list[Request]) -> list[RequestTimes]:
    """The requests one at a time, on one engine."""
    from fastserve.engine.engine import Engine

    times: list[RequestTimes] = []
    clock = OwnClock()
    engine = Engine(EngineConfig(**options, prefix_caching=False), clock)
    for request in requests:
        alone = Replay(engine, clock, [msgspec.structs.replace(request, arrival_time=clock())])
        side_by_side([alone])
        times += alone.times
    engine.close()
    return times


def measure(arguments: argparse.Namespace, file: Path) -> Report:
    model = arguments.model or str(random_model.make("llama-0.1b"))
    options: dict[str, Any] = {
        "speculation": "off",  # a random network repeats itself, and guesses would change what the lengths cost
        "model": model,
        "dtype": "bfloat16",
        "max_batch_sequences": MAX_BATCH_SEQUENCES,
        "max_batch_tokens": arguments.max_batch_tokens,
        "max_model_len": 2 * arguments.context,  # room for paused sequences
    }
    trace = read_trace(file, arguments.requests, arguments.offset).fit(arguments.context)
    report = Report("policies", {**options, "trace": trace.name, "offset": trace.offset, "load": arguments.load})
    report.limits["before"] = measure_limits()
    at_once = make_requests(trace.all_at_once(), VOCAB_SIZE)
    rate = arguments.capacity or saturated_rate(
        serve(options, [policies.FLOOR], at_once)[policies.FLOOR][0], MAX_BATCH_SEQUENCES
    )
    unloaded = summarise(serve_alone(options, at_once[:5]))
    limits = Limits(5 * unloaded["mean_ttft"], 10 * unloaded["mean_tpot"])
    names = list(dict.fromkeys([policies.FLOOR, *arguments.policies, policies.CEILING]))
    served = serve(options, names, make_requests(trace.at_rate(arguments.load * rate), VOCAB_SIZE))
    results = {name: {**summarise(times, limits), **counts} for name, (times, counts) in served.items()}
    for name, figures in results.items():
        report.metrics.update({f"{name}.{figure}": value for figure, value in figures.items()})
    report.limits["after"] = measure_limits()
    ours = policies.DEFAULT_POLICY if policies.DEFAULT_POLICY in results else arguments.policies[0]
    report.metrics.update(policies.against_floor(results, ours))
    report.config.update(
        capacity_requests_per_s=rounded(rate),
        length_scale=trace.length_scale,
        num_requests=len(trace.requests),
        goodput_limits={"ttft": limits.ttft, "tpot": limits.tpot},
        ratios_of=ours,
    )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_trace_options(parser, context=1024)
    parser.add_argument("--policies", nargs="+", default=list(POLICY_NAMES))
    parser.add_argument("--max-batch-tokens", type=int, default=256)
    parser.add_argument("--model", default="")
    parser.add_argument("--capacity", type=float, default=0.0, help="requests per second, if measured already")
    arguments = parser.parse_args()
    if not arguments.trace.exists():
        report = Report("policies", skipped={"trace": f"{arguments.trace} is not there; give one with --trace"})
    else:
        report = measure(arguments, arguments.trace)
    emit(report.as_dict())


if __name__ == "__main__":
    main()
