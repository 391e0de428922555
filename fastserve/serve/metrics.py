"""Prometheus metrics of one server, made from the catalogue in `core/metrics.py`.

The API process owns the registry. Engine counters are read from the client when `/metrics` is asked for; latencies
and lengths are observed here, where clients' time passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fastserve.core.metrics import (
    CATALOGUE,
    ENGINE_METRICS,
    NOT_IN_VLLM,
    PREFIX,
    REQUEST_METRICS,
    TENANT_METRICS,
    VLLM_PREFIX,
)
from fastserve.core.request import FINISH_ABORT
from fastserve.engine.client import EngineClient, EngineState
from fastserve.serve.array_metrics import ArrayMetrics

if TYPE_CHECKING:
    from fastserve.serve.generation import Choice


class Metrics:
    """What `/metrics` exports, and the places where requests are counted; `arrays` is for those without tokens."""

    def __init__(self, client: EngineClient, model_name: str, compat: str = "none") -> None:
        """
        Args:
            compat: vllm exports vLLM's names beside ours; none does not.
        """
        self._registry = CollectorRegistry()
        self._extra = CollectorRegistry()
        if compat == "vllm":
            self._extra.register(_VllmNames(self._registry))
        self._registry.register(_EngineCollector(client, model_name))
        ProcessCollector(registry=self._registry)
        self.arrays = ArrayMetrics(client.arrays, self._registry)
        histograms: dict[str, Histogram] = {}
        for metric in REQUEST_METRICS:
            if metric.kind == "histogram":
                histogram = Histogram(
                    PREFIX + metric.name, metric.help, ["model_name"], registry=self._registry, buckets=metric.buckets
                )
                histograms[metric.name] = histogram.labels(model_name)
        self._first_token = histograms["time_to_first_token_seconds"]
        self._inter_token = histograms["inter_token_latency_seconds"]
        self._per_token = histograms["time_per_output_token_seconds"]
        self._end_to_end = histograms["e2e_request_latency_seconds"]
        self._queue_time = histograms["request_queue_time_seconds"]
        self._prefill_time = histograms["request_prefill_time_seconds"]
        self._decode_time = histograms["request_decode_time_seconds"]
        self._inference_time = histograms["request_inference_time_seconds"]
        self._max_tokens = histograms["request_params_max_tokens"]
        self._prompt_tokens = histograms["request_prompt_tokens"]
        self._generation_tokens = histograms["request_generation_tokens"]
        success = next(metric for metric in REQUEST_METRICS if metric.name == "request_success")
        self._finished = Counter(
            PREFIX + success.name, success.help, ["model_name", *success.labels], registry=self._registry
        )
        self._tenants = {
            metric.name: Counter(
                PREFIX + metric.name, metric.help, ["model_name", *metric.labels], registry=self._registry
            )
            for metric in TENANT_METRICS
        }
        self._model_name = model_name

    def observe_admission(self, tenant: str, num_sequences: int, num_prompt_tokens: int) -> None:
        """Sequences of one request were taken in; `tenant` "" is nobody in particular."""
        self._count(tenant, "tenant_requests", num_sequences)
        self._count(tenant, "tenant_prompt_tokens", num_prompt_tokens)

    def observe_refusal(self, tenant: str, num_sequences: int) -> None:
        """There was no room for the sequences of one request."""
        self._count(tenant, "tenant_requests_refused", num_sequences)

    def _count(self, tenant: str, name: str, amount: int) -> None:
        if tenant:
            self._tenants[name].labels(self._model_name, tenant).inc(amount)

    def observe_tokens(self, choice: Choice, now: float, scheduled_time: float, count: int) -> None:
        """`count` tokens of `choice` arrived at `now`; called before its own times are moved on."""
        arrival = choice.request.arrival_time
        self._count(choice.request.tenant, "tenant_generation_tokens", count)
        if choice.last_time == 0.0:
            self._first_token.observe(now - arrival)
            if scheduled_time:
                self._queue_time.observe(max(0.0, scheduled_time - arrival))
                self._prefill_time.observe(max(0.0, now - scheduled_time))
                choice.scheduled_time = scheduled_time
            return
        for _ in range(count):
            self._inter_token.observe((now - choice.last_time) / count)

    def observe_end(self, choice: Choice) -> None:
        """`choice` has finished by itself."""
        self._finished.labels(self._model_name, choice.finish_reason).inc()
        self._end_to_end.observe(choice.last_time - choice.request.arrival_time)
        self._prompt_tokens.observe(len(choice.request.prompt_ids))
        self._generation_tokens.observe(choice.num_tokens)
        self._decode_time.observe(choice.last_time - choice.first_time)
        self._inference_time.observe(choice.last_time - (choice.scheduled_time or choice.first_time))
        self._max_tokens.observe(choice.request.sampling.max_tokens or 0)
        if choice.num_tokens > 1:
            self._per_token.observe((choice.last_time - choice.first_time) / (choice.num_tokens - 1))

    def observe_abort(self) -> None:
        """A choice was given up: the client left, or the engine failed."""
        self._finished.labels(self._model_name, FINISH_ABORT).inc()

    def export(self) -> bytes:
        """The text form that Prometheus scrapes."""
        return generate_latest(self._registry) + generate_latest(self._extra)


class _EngineCollector(Collector):
    """Reads the engine's counters at each scrape; totals go on across restarts of the engine."""

    def __init__(self, client: EngineClient, model_name: str) -> None:
        self._client = client
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        for metric in ENGINE_METRICS:
            family: type[CounterMetricFamily] | type[GaugeMetricFamily]
            family = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
            sample = family(PREFIX + metric.name, metric.help, labels=["model_name"])
            sample.add_metric([self._model_name], float(_ENGINE_VALUES[metric.name](self._client)))
            yield sample

    def describe(self) -> Iterable[Metric]:
        return []


class _VllmNames(Collector):
    """Our metrics under the names that dashboards and scalers made for vLLM ask for."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._ours = {PREFIX + metric.name for metric in CATALOGUE if metric.name not in NOT_IN_VLLM}

    def collect(self) -> Iterable[Metric]:
        for metric in self._registry.collect():
            if metric.name in self._ours:
                renamed = Metric(VLLM_PREFIX + metric.name.removeprefix(PREFIX), metric.documentation, metric.type)
                renamed.samples = [
                    sample._replace(
                        name=VLLM_PREFIX + sample.name.removeprefix(PREFIX), labels={**sample.labels, "engine": "0"}
                    )
                    for sample in metric.samples
                ]
                yield renamed

    def describe(self) -> Iterable[Metric]:
        return []


_ENGINE_VALUES: dict[str, Callable[[EngineClient], float]] = {
    "num_requests_running": lambda client: client.stats.num_running,
    # Requests that the engine has not seen yet (it restarts, or has just been sent them) wait as well.
    "num_requests_waiting": lambda client: max(client.stats.num_waiting, client.num_live - client.stats.num_running),
    "kv_cache_usage_perc": lambda client: client.stats.kv_blocks_used / max(client.stats.kv_blocks_total, 1),
    "prefix_cache_queries": lambda client: client.totals.prefix_cache_queries,
    "prefix_cache_hits": lambda client: client.totals.prefix_cache_hits,
    "num_preemptions": lambda client: client.totals.num_preemptions,
    "recomputed_tokens": lambda client: client.totals.recomputed_tokens,
    "kv_blocks_kept": lambda client: client.totals.kv_blocks_kept,
    "kv_blocks_restored": lambda client: client.totals.kv_blocks_restored,
    "kv_errors": lambda client: client.totals.kv_errors,
    "kv_move_seconds": lambda client: client.totals.kv_move_seconds,
    "spec_decode_num_draft_tokens": lambda client: client.totals.draft_tokens,
    "spec_decode_num_accepted_tokens": lambda client: client.totals.draft_tokens_right,
    "prompt_tokens": lambda client: client.totals.prompt_tokens,
    "generation_tokens": lambda client: client.totals.generation_tokens,
    "engine_steps": lambda client: client.totals.num_steps,
    "engine_step_seconds": lambda client: client.totals.step_seconds,
    "engine_restarts": lambda client: client.num_restarts,
    "engine_ready": lambda client: client.state is EngineState.READY,
}
