"""How well the simulator agrees with the real engine, and how fast it is.

    python benchmarks/simulator.py --trace ../shared/data/traces/azure_llm_2023_conv.csv --load 0.9
    python benchmarks/simulator.py --scale-requests 1000000        # also 64 replicas behind a router; 15 to 30 minutes

The engine (random weights of the llama-0.1b shape, bfloat16) first serves the requests all at once: that gives its
capacity. Then it serves them at the load with each policy, and the simulator does the same. Beside these runs, in
turn with them, another engine serves the requests all at once again: its steps, not theirs, calibrate the simulator.
`metrics.error_vs_engine.mean` and `.p99` are the worst relative errors of mean and P99 end-to-end latency over the
policies. `metrics.requests_per_s` is how many requests per second of wall clock are simulated on 64 replicas.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from shared_data import add_trace_options

from fastserve.bench import cluster, random_model
from fastserve.bench.latencies import RequestTimes, saturated_rate, summarise
from fastserve.bench.replay import OwnClock, RecordingCost, Replay, side_by_side
from fastserve.bench.report import Report, emit, measure_limits, rounded
from fastserve.bench.simulate import Machine, make_requests, simulate
from fastserve.bench.traces import read_trace
from fastserve.core.config import EngineConfig
from fastserve.core.request import Request
from fastserve.engine.engine import Engine
from fastserve.scheduler.cost import Coefficients, CostModel

VOCAB_SIZE = 8000
_COMPARED = ("normalised_latency", "ttft", "e2e")


class Measured:
    """One policy's engine with its clock and the steps that it took."""

    def __init__(self, options: dict[str, Any], policy: str, requests: list[Request]) -> None:
        self.cost = RecordingCost()
        self.clock = OwnClock()
        self.engine = Engine(EngineConfig(**options, scheduler=policy), self.clock, self.cost)
        self.replay = Replay(self.engine, self.clock, requests)

    @property
    def times(self) -> list[RequestTimes]:
        return self.replay.times


def calibrate(run: Measured) -> Coefficients:
    """Step times from a run without idle time; what passes between steps is spread over them.

    The fit minimises relative errors and so lies a little under the mean of noisy steps; one factor puts that right.
    """
    model = CostModel(memory=1_000_000)
    model.warm_up(run.cost.steps)
    measured = sum(seconds for _, seconds in run.cost.steps)
    factor = measured / sum(model.coefficients.seconds(work) for work, _ in run.cost.steps)
    between = (run.clock() - measured) / len(run.cost.steps)
    scaled = [factor * value for value in dataclasses.astuple(model.coefficients)]
    return Coefficients(scaled[0] + between, *scaled[1:])


def bias(run: Measured, coefficients: Coefficients) -> float:
    """Predicted over measured time of all steps of a run, less one."""
    measured = sum(seconds for _, seconds in run.cost.steps)
    return sum(coefficients.seconds(work) for work, _ in run.cost.steps) / measured - 1.0


def compare(arguments: argparse.Namespace, report: Report) -> Coefficients:
    """Fill in `error_vs_engine`; returns the calibrated coefficients."""
    options: dict[str, Any] = {
        "speculation": "off",  # a random network repeats itself, and the simulator does not guess
        "model": arguments.model or str(random_model.make("llama-0.1b")),
        "dtype": "bfloat16",
        "max_batch_sequences": 16,
        "max_batch_tokens": arguments.max_batch_tokens,
        "max_model_len": 2 * arguments.context,
    }
    trace = read_trace(arguments.trace, arguments.requests, arguments.offset).fit(arguments.context)
    report.config.update(options, trace=trace.name, load=arguments.load, length_scale=trace.length_scale)
    at_once = Measured(options, "fcfs", make_requests(trace.all_at_once(), VOCAB_SIZE))
    side_by_side([at_once.replay])
    rate = saturated_rate(at_once.times, 16)
    at_once.engine.close()
    requests = make_requests(trace.at_rate(arguments.load * rate), VOCAB_SIZE)
    runs = {name: Measured(options, name, requests) for name in arguments.policies}
    beside = Measured(options, "fcfs", make_requests(trace.all_at_once(), VOCAB_SIZE))
    side_by_side([beside.replay, *(run.replay for run in runs.values())])
    coefficients = calibrate(beside)
    beside.engine.close()
    memory = next(iter(runs.values())).engine.memory
    machine = Machine(
        coefficients, 16, arguments.max_batch_tokens, memory.max_model_len, memory.num_blocks, memory.block_size
    )
    worst = {"mean": 0.0, "p99": 0.0}
    for name, run in runs.items():
        engine, simulated = summarise(run.times), summarise(simulate(requests, machine, name).times)
        for label in worst:
            for figure in _COMPARED:
                error = simulated[f"{label}_{figure}"] / engine[f"{label}_{figure}"] - 1.0
                report.metrics[f"{name}.error.{label}_{figure}"] = rounded(error)
                report.metrics[f"{name}.engine.{label}_{figure}"] = engine[f"{label}_{figure}"]
                if figure == "e2e":
                    worst[label] = max(worst[label], abs(error))
        report.metrics[f"{name}.step_time_bias"] = rounded(bias(run, coefficients))
        run.engine.close()
    report.metrics.update({f"error_vs_engine.{label}": rounded(error) for label, error in worst.items()})
    report.config.update(capacity_requests_per_s=rounded(rate), num_requests=len(requests))
    report.config["coefficients"] = str(coefficients)
    return coefficients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_trace_options(parser, context=1024)
    parser.add_argument("--policies", nargs="+", default=["fcfs", "aged-srpt"])
    parser.add_argument("--max-batch-tokens", type=int, default=256)
    parser.add_argument("--model", default="")
    parser.add_argument("--scale-requests", type=int, default=20_000, help="requests of the run on many replicas")
    parser.add_argument("--replicas", type=int, default=64)
    arguments = parser.parse_args()
    report = Report("simulator")
    if not arguments.trace.exists():
        report.skipped["trace"] = f"{arguments.trace} is not there; give one with --trace"
        emit(report.as_dict())
        return
    report.limits["before"] = measure_limits()
    coefficients = compare(arguments, report)
    report.limits["after"] = measure_limits()
    scaled = cluster.run(
        str(arguments.trace),
        num_requests=arguments.scale_requests,
        num_replicas=arguments.replicas,
        router="least-loaded",
        machine=Machine(coefficients),
    )
    report.config["scale"] = scaled["config"]
    report.metrics["requests_per_s"] = scaled["metrics"]["simulated_requests_per_s"]
    emit(report.as_dict())


if __name__ == "__main__":
    main()
