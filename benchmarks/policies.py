"""Scheduling policies side by side on the real engine, on a request trace at a share of capacity.

    python benchmarks/policies.py --trace ../shared/data/traces/azure_llm_2023_conv.csv --load 0.9
    python benchmarks/policies.py --requests 60 --policies aged-srpt       # a first look

Random weights of the llama-0.1b shape, float32, at most 16 sequences in a step. A new engine for each policy, in turn;
the same requests, greedy, to their recorded lengths. Capacity is measured first, with FCFS and everything there at the
start. Without --trace, the Azure conversations of the shared data are used, if they are there.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from fastserve.bench import policies, random_model
from fastserve.bench.latencies import Limits, RequestTimes, summarise
from fastserve.bench.replay import replay
from fastserve.bench.report import Report, emit, measure_limits, rounded
from fastserve.bench.simulate import make_requests
from fastserve.bench.traces import Trace, read_trace
from fastserve.core.config import EngineConfig
from fastserve.core.request import Request
from fastserve.scheduler.policy import POLICY_NAMES

VOCAB_SIZE = 8000


def serve(options: dict[str, Any], policy: str, requests: list[Request]) -> tuple[list[RequestTimes], dict[str, float]]:
    """One run on a new engine."""
    from fastserve.engine.engine import Engine

    engine = Engine(EngineConfig(**options, scheduler=policy))
    try:
        times = replay(engine, requests)
        stats = engine.stats()
        return times, {"preemptions": stats.num_preemptions, "cached_tokens": stats.prefix_cache_hits}
    finally:
        engine.close()


def serve_alone(options: dict[str, Any], requests: list[Request]) -> list[RequestTimes]:
    """The requests one at a time."""
    from fastserve.engine.engine import Engine

    engine = Engine(EngineConfig(**options, prefix_caching=False))
    try:
        return [replay(engine, [request])[0] for request in requests]
    finally:
        engine.close()


def capacity(options: dict[str, Any], trace: Trace) -> float:
    """Requests per second while the queue is never empty (see `simulate.capacity`)."""
    times, _ = serve(options, policies.FLOOR, make_requests(trace.all_at_once(), VOCAB_SIZE))
    first_tokens = sorted(item.first_token for item in times)
    filled = min(options["max_batch_sequences"], len(times) // 2)
    return (len(times) - filled) / (first_tokens[-1] - first_tokens[filled - 1])


def measure(arguments: argparse.Namespace, file: Path) -> Report:
    model = arguments.model or str(random_model.make("llama-0.1b"))
    options: dict[str, Any] = {
        "model": model,
        "dtype": "float32",
        "max_batch_sequences": 16,
        "max_batch_tokens": arguments.max_batch_tokens,
        "max_model_len": arguments.context,
    }
    trace = read_trace(file, arguments.requests, arguments.offset).fit(arguments.context)
    report = Report("policies", {**options, "trace": trace.name, "offset": trace.offset, "load": arguments.load})
    report.limits["before"] = measure_limits()
    rate = arguments.capacity or capacity(options, trace)
    report.config.update(
        capacity_requests_per_s=rounded(rate), length_scale=trace.length_scale, num_requests=len(trace.requests)
    )
    requests = make_requests(trace.at_rate(arguments.load * rate), VOCAB_SIZE)
    unloaded = summarise(serve_alone(options, make_requests(trace.all_at_once(), VOCAB_SIZE)[:5]))
    limits = Limits(5 * unloaded["mean_ttft"], 10 * unloaded["mean_tpot"])
    results: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys([policies.FLOOR, *arguments.policies, policies.CEILING]):
        times, counts = serve(options, name, requests)
        results[name] = {**summarise(times, limits), **counts}
        report.metrics.update({f"{name}.{figure}": value for figure, value in results[name].items()})
    report.limits["after"] = measure_limits()
    ours = policies.DEFAULT_POLICY if policies.DEFAULT_POLICY in results else arguments.policies[0]
    report.metrics.update(policies.against_floor(results, ours))
    report.config["ratios_of"] = ours
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = Path(os.environ.get("FASTSERVE_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    parser.add_argument("--trace", type=Path, default=shared / "data/traces/azure_llm_2023_conv.csv")
    parser.add_argument("--load", type=float, default=0.9)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--offset", type=int, default=0)
    parser.add_argument("--policies", nargs="+", default=list(POLICY_NAMES))
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--max-batch-tokens", type=int, default=512)
    parser.add_argument("--capacity", type=float, default=0.0, help="requests per second, if measured already")
    parser.add_argument("--model", default="")
    arguments = parser.parse_args()
    if not arguments.trace.exists():
        report = Report("policies", skipped={"trace": f"{arguments.trace} is not there; give one with --trace"})
    else:
        report = measure(arguments, arguments.trace)
    emit(report.as_dict())


if __name__ == "__main__":
    main()
