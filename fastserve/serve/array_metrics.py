"""Metrics of encoders and of the user's own networks, each under its own `model_name` (names: `core/metrics.py`).

Batches are told by the engine after each step, so totals go on across its restarts; calls are observed where they end.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fastserve.core.arrays import ArrayBatch
from fastserve.core.errors import FastServeError, RequestError
from fastserve.core.metrics import ARRAY_METRICS, PREFIX
from fastserve.engine.array_client import ArrayClient


class ArrayMetrics:
    """Counts into `registry` what becomes of calls, and every batch that the engine tells `arrays` of."""

    def __init__(self, arrays: ArrayClient, registry: CollectorRegistry) -> None:
        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        for metric in ARRAY_METRICS:
            name, labels = PREFIX + metric.name, ["model_name", *metric.labels]
            if metric.kind == "counter":
                self._counters[metric.name] = Counter(name, metric.help, labels, registry=registry)
            elif metric.kind == "histogram":
                self._histograms[metric.name] = Histogram(
                    name, metric.help, labels, registry=registry, buckets=metric.buckets
                )
        registry.register(_LiveCollector(arrays))
        arrays.on_batch = self.observe_batch

    def observe_batch(self, batch: ArrayBatch) -> None:
        """The engine computed `batch`."""
        self._histograms["array_batch_requests"].labels(batch.model).observe(batch.num_requests)
        self._counters["array_tokens"].labels(batch.model).inc(batch.num_tokens)
        self._counters["array_padding_tokens"].labels(batch.model).inc(batch.num_computed - batch.num_tokens)
        self._counters["array_step_seconds"].labels(batch.model).inc(batch.seconds)

    @contextlib.contextmanager
    def call(self, model: str, num_requests: int) -> Iterator[None]:
        """Around a call of `num_requests` to `model`: counts how it ends, and the time of one that is answered."""
        started, outcome = time.monotonic(), "abandoned"  # cancelled, unless something else is found
        try:
            yield
            outcome = "answered"
            self._histograms["array_request_latency_seconds"].labels(model).observe(time.monotonic() - started)
        except RequestError:
            outcome = "refused"
            raise
        except FastServeError:
            outcome = "failed"
            raise
        finally:
            self._counters["array_requests"].labels(model, outcome).inc(num_requests)


class _LiveCollector(Collector):
    """Requests without an answer, counted at each scrape."""

    def __init__(self, arrays: ArrayClient) -> None:
        self._arrays = arrays

    def collect(self) -> Iterable[Metric]:
        [metric] = [metric for metric in ARRAY_METRICS if metric.kind == "gauge"]
        sample = GaugeMetricFamily(PREFIX + metric.name, metric.help, labels=["model_name"])
        for model in self._arrays.models:
            sample.add_metric([model], self._arrays.num_live_of(model))
        yield sample

    def describe(self) -> Iterable[Metric]:
        return []
