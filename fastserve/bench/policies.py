"""All scheduling policies side by side on one trace and one load: FCFS is the floor, the SRPT oracle the ceiling.

The same requests for each policy, the same arrival times, `ignore_eos` with the recorded lengths. Policies other than
the oracle never see `max_tokens`. Here the network is a cost model (see `simulate`); figures say so in `config`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastserve.bench.bounds import least_mean_ttft
from fastserve.bench.latencies import Limits, gap_closed, ratios, summarise
from fastserve.bench.report import Report, rounded
from fastserve.bench.simulate import Machine, Run, capacity, make_requests, simulate
from fastserve.bench.traces import Trace, read_trace
from fastserve.core.errors import ConfigError
from fastserve.scheduler.policy import POLICY_NAMES

DEFAULT_POLICY = "aged-srpt"
FLOOR, CEILING = "fcfs", "srpt-oracle"
PLOTTED_LOADS = (0.5, 0.7, 0.9, 1.1)
_COMPARED = tuple(f"{label}_{figure}" for figure in ("normalised_latency", "ttft", "e2e") for label in ("mean", "p99"))


def compare(
    trace: str,
    *,
    load: float = 0.9,
    num_requests: int = 300,
    offset: int = 0,
    policies: Sequence[str] = POLICY_NAMES,
    default_policy: str = DEFAULT_POLICY,
    machine: Machine | None = None,
    length_scale: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Simulate policies on a trace and return the report.

    Args:
        trace: a trace file (see `traces.read_trace`).
        load: share of capacity, which is the saturated throughput with FCFS on the same requests.
        default_policy: the one whose ratios and share of the oracle's gap are reported.

    Metrics: per policy the figures of `latencies.summarise`, preemptions, recomputed and cached tokens; of the default
    policy `ratio_vs_fcfs.*` (above 1 is better) and, where FCFS and the oracle differ, `oracle_gap_closed` (mean
    normalised latency); `bound.*` is the mean TTFT that no order of service can beat, and how much better than FCFS's.

    Raises:
        ConfigError: the trace cannot be read, or the load is not positive.
    """
    _check_load(load)
    machine = machine or Machine()
    fitted = read_trace(trace, num_requests, offset, seed).fit(machine.context, length_scale)
    requests_per_s = capacity(fitted, machine)
    replayed = fitted.at_rate(load * requests_per_s)
    requests = make_requests(replayed)
    limits = unloaded_limits(fitted, machine)
    report = Report("policies", _config(fitted, load, requests_per_s, machine, limits))
    names = dict.fromkeys([FLOOR, *policies, default_policy, CEILING])
    results = {name: _figures(simulate(requests, machine, name), limits) for name in names}
    for name, figures in results.items():
        report.metrics.update({f"{name}.{figure}": value for figure, value in figures.items()})
    report.metrics.update(against_floor(results, default_policy))
    bound = least_mean_ttft(requests, machine)
    report.metrics["bound.mean_ttft"] = rounded(bound)
    report.metrics["bound.ratio_vs_fcfs.mean_ttft"] = rounded(results[FLOOR]["mean_ttft"] / bound)
    return report.as_dict()


def plot(
    folder: Path,
    trace: str,
    *,
    load: float,
    num_requests: int,
    offset: int,
    policies: Sequence[str],
    machine: Machine,
    loads: Sequence[float] = PLOTTED_LOADS,
) -> None:
    """Simulate the policies at several loads, and draw latency against load; queue and steps over time at `load`.

    Raises:
        ConfigError: as `compare`, or matplotlib is not installed.
    """
    from fastserve.bench.plots import draw

    _check_load(load)
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib; install it: pip install matplotlib")
    fitted = read_trace(trace, num_requests, offset).fit(machine.context)
    rate = capacity(fitted, machine)
    names = tuple(dict.fromkeys([FLOOR, *policies, CEILING]))
    sweep = {}
    for each in loads:
        requests = make_requests(fitted.at_rate(each * rate))
        sweep[each] = {name: summarise(simulate(requests, machine, name).times) for name in names}
    requests = make_requests(fitted.at_rate(load * rate))
    runs = {name: simulate(requests, machine, name, record=True) for name in names}
    draw(folder, f"{fitted.name}, simulated; over time at {load:.0%} of capacity", sweep, runs)


def _check_load(load: float) -> None:
    if not 0 < load < math.inf:
        raise ConfigError(f"load is a share of capacity above 0, not {load:g}")


def against_floor(results: dict[str, dict[str, float]], policy: str) -> dict[str, float]:
    """`ratio_vs_fcfs.*` and `oracle_gap_closed` of a policy; the last only where there is a gap."""
    floor, ours, ceiling = results[FLOOR], results[policy], results[CEILING]
    metrics = {f"ratio_vs_fcfs.{name}": value for name, value in ratios(ours, floor, _COMPARED).items()}
    metrics["ratio_vs_fcfs.throughput"] = rounded(ours["requests_per_s"] / floor["requests_per_s"])
    name = "mean_normalised_latency"
    if floor[name] != ceiling[name]:
        metrics["oracle_gap_closed"] = rounded(gap_closed(ours[name], floor[name], ceiling[name]))
    return metrics


def unloaded_limits(trace: Trace, machine: Machine, ttft_factor: float = 5.0, tpot_factor: float = 10.0) -> Limits:
    """Goodput limits: so many times the mean TTFT and TPOT of the same requests one at a time."""
    coefficients = machine.coefficients
    alone = [request.num_prompt for request in trace.requests]
    ttft = sum(coefficients.step + coefficients.prefill_token * tokens for tokens in alone) / len(alone)
    return Limits(rounded(ttft_factor * ttft), rounded(tpot_factor * (coefficients.step + coefficients.decode)))


def _figures(run: Run, limits: Limits) -> dict[str, float]:
    figures = summarise(run.times, limits)
    figures["preemptions"] = run.num_preemptions
    figures["pauses"] = run.num_pauses
    figures["recomputed_tokens"] = run.num_recomputed_tokens
    figures["cached_tokens"] = run.num_cached_tokens
    return figures


def _config(trace: Trace, load: float, requests_per_s: float, machine: Machine, limits: Limits) -> dict[str, Any]:
    return {
        "trace": trace.name,
        "num_requests": len(trace.requests),
        "offset": trace.offset,
        "length_scale": trace.length_scale,
        "arrivals": "recorded" if trace.has_arrivals else "poisson",
        "load": load,
        "capacity_requests_per_s": rounded(requests_per_s),
        "engine": "simulated: the engine's scheduler with a cost model in place of the network",
        "goodput_limits": dataclasses.asdict(limits),
        **dataclasses.asdict(machine),
    }
