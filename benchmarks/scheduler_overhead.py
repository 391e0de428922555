"""What the scheduler itself costs: time of plan + update per step, no model, for every policy.

    python benchmarks/scheduler_overhead.py                     # 256 running, 10,000 waiting
    python benchmarks/scheduler_overhead.py --running 64 --waiting 1000 --policies fcfs

The queue is kept full: what finishes is replaced. Answers take 40 to 400 tokens, so in most steps somebody joins or
leaves. The clock of the scheduler is virtual (a step takes what a model would); what is measured is real time. As in
the engine process, the garbage collector is frozen after the start (`--no-freeze` shows why).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

from fastserve.bench.report import Report, emit, rounded
from fastserve.bench.simulate import LLAMA_01B_CPU
from fastserve.core.request import Request
from fastserve.core.sampling_params import SamplingParams
from fastserve.engine.process import settle_garbage
from fastserve.scheduler.block_pool import BlockPool
from fastserve.scheduler.cost import CostModel, StepWork
from fastserve.scheduler.plan import StepResult
from fastserve.scheduler.policy import POLICY_NAMES, PolicyContext, make_policy
from fastserve.scheduler.scheduler import Scheduler


def make_request(index: int, now: float) -> Request:
    num_prompt, num_output = 20 + index * 37 % 200, 40 + index * 101 % 360
    prompt = [(index * 7919 + place) % 8000 for place in range(num_prompt)]
    sampling = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
    return Request(str(index), prompt, sampling, now, priority=index % 3, tenant=f"tenant {index % 20}")


def measure(policy: str, running: int, waiting: int, steps: int, skip: int) -> list[float]:
    """Milliseconds of each step's plan and update, arrivals not counted."""
    cost = CostModel(LLAMA_01B_CPU)
    scheduler = Scheduler(
        BlockPool(running * 64, 16),
        make_policy(policy, PolicyContext(cost, running)),
        max_batch_sequences=running,
        max_batch_tokens=max(1024, 2 * running),
        max_model_len=1024,
        cost=cost,
    )
    now, num_made, times = 0.0, 0, []
    for step in range(skip + steps):
        while scheduler.num_running + scheduler.num_waiting < running + waiting:
            scheduler.add(make_request(num_made, now), now)
            num_made += 1
        began = time.perf_counter()
        plan = scheduler.plan(now)
        planned = time.perf_counter()
        seconds = LLAMA_01B_CPU.seconds(StepWork.of(plan))
        now += seconds
        result = StepResult({entry.request_id: entry.start % 8000 for entry in plan.entries if entry.samples})
        resumed = time.perf_counter()
        scheduler.update(plan, result, seconds, now)
        if step >= skip:
            times.append(1000 * (planned - began + time.perf_counter() - resumed))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--skip", type=int, default=200, help="steps before the first that counts")
    parser.add_argument("--policies", nargs="+", default=list(POLICY_NAMES))
    parser.add_argument("--no-freeze", action="store_true", help="leave Python's garbage collector as it is")
    arguments = parser.parse_args()
    report = Report("scheduler_overhead", vars(arguments))
    if not arguments.no_freeze:
        settle_garbage()
    for policy in arguments.policies:
        gc.collect()
        times = measure(policy, arguments.running, arguments.waiting, arguments.steps, arguments.skip)
        report.metrics[f"{policy}.median_ms"] = rounded(statistics.median(times))
        report.metrics[f"{policy}.p99_ms"] = rounded(statistics.quantiles(times, n=100)[98])
        report.metrics[f"{policy}.max_ms"] = rounded(max(times))
    emit(report.as_dict())


if __name__ == "__main__":
    main()
