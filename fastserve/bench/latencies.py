"""What a run of requests felt like: the latency figures that policies and servers are compared by."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastserve.bench.report import percentile, rounded

PERCENTILES = (("p50", 0.50), ("p95", 0.95), ("p99", 0.99))


@dataclass(slots=True)
class RequestTimes:
    """When one request arrived, got its first and its last token (seconds, one clock), and how many tokens it got and
    had brought along."""

    arrival: float
    first_token: float
    last_token: float
    num_tokens: int
    num_prompt: int
    tenant: str = ""

    @property
    def ttft(self) -> float:
        return self.first_token - self.arrival

    @property
    def e2e(self) -> float:
        return self.last_token - self.arrival

    @property
    def tpot(self) -> float:
        """Seconds per token after the first; 0 for a single token."""
        return (self.last_token - self.first_token) / max(1, self.num_tokens - 1)

    @property
    def normalised(self) -> float:
        """End-to-end seconds per output token."""
        return self.e2e / self.num_tokens


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds within which a request counts as good."""

    ttft: float
    tpot: float


def summarise(times: Sequence[RequestTimes], limits: Limits | None = None) -> dict[str, float]:
    """Mean and percentiles of normalised_latency, ttft, tpot and e2e (seconds), throughput, and goodput (0..1).

    TPOT is over requests of two tokens and more. Throughput is from the first arrival to the last token.
    """
    figures: dict[str, float] = {}
    series: dict[str, list[float]] = {
        "normalised_latency": [item.normalised for item in times],
        "ttft": [item.ttft for item in times],
        "tpot": [item.tpot for item in times if item.num_tokens > 1],
        "e2e": [item.e2e for item in times],
    }
    for name, values in series.items():
        figures[f"mean_{name}"] = statistics.fmean(values) if values else 0.0
        for label, share in PERCENTILES:
            figures[f"{label}_{name}"] = percentile(values, share) if values else 0.0
    seconds = max(item.last_token for item in times) - min(item.arrival for item in times)
    figures["requests_per_s"] = len(times) / seconds
    figures["output_tokens_per_s"] = sum(item.num_tokens for item in times) / seconds
    if limits is not None:
        good = sum(item.ttft <= limits.ttft and item.tpot <= limits.tpot for item in times)
        figures["goodput"] = good / len(times)
    return {name: rounded(value) for name, value in figures.items()}


def gap_closed(ours: float, fcfs: float, oracle: float) -> float:
    """The share of the way from FCFS to the oracle, which must differ, that we go: 0 is FCFS, 1 the oracle."""
    return (fcfs - ours) / (fcfs - oracle)


def ratios(ours: dict[str, float], theirs: dict[str, float], names: Iterable[str]) -> dict[str, float]:
    """How many times better ours is (above 1 is better): theirs over ours for latencies."""
    return {name: rounded(theirs[name] / ours[name]) for name in names if ours.get(name)}


def saturated_rate(times: Sequence[RequestTimes], max_batch_sequences: int) -> float:
    """Requests of average size per second, of a run in which all arrived at 0, until fewer are left than a batch holds.

    The end, when the last long answers run in an ever smaller batch, says nothing about a server under load. Work is
    counted in tokens, of prompts and of answers, so that it does not matter in which order a server takes them.
    """
    full_batch = min(max_batch_sequences, len(times) // 2)
    end = sorted(item.last_token for item in times)[-full_batch]
    done = 0.0
    for item in times:
        if item.first_token <= end:
            answered = (end - item.first_token) / max(1e-9, item.last_token - item.first_token)
            done += item.num_prompt + item.num_tokens * min(1.0, answered)
    return len(times) * done / sum(item.num_prompt + item.num_tokens for item in times) / end
