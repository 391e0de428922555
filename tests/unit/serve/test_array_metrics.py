"""Metrics of models that answer with arrays: what ends a call, what the engine tells of batches, who still waits."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from fastserve.core.arrays import ArrayBatch, ArrayOutput, ModelInfo, ModelSpec, PoolingRequest
from fastserve.core.errors import EngineDeadError, RequestError
from fastserve.engine.array_client import ArrayClient
from fastserve.engine.messages import EngineStats, Outputs, Ready
from fastserve.serve.array_metrics import ArrayMetrics


def make() -> tuple[ArrayMetrics, ArrayClient, CollectorRegistry]:
    registry = CollectorRegistry()
    arrays = ArrayClient([ModelSpec("a", {})], lambda frame: True, 3)
    return ArrayMetrics(arrays, registry), arrays, registry


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "answered"),
        (RequestError("too long"), "refused"),
        (EngineDeadError("gone"), "failed"),
        (TimeoutError(), "abandoned"),
        (asyncio.CancelledError(), "abandoned"),
    ],
)
def test_a_call_is_counted_by_how_it_ends(error: BaseException | None, outcome: str) -> None:
    metrics, _, registry = make()
    try:
        with metrics.call("a", 3):
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    labels = {"model_name": "a", "outcome": outcome}
    assert registry.get_sample_value("fastserve_array_requests_total", labels) == 3
    counted = registry.get_sample_value("fastserve_array_request_latency_seconds_count", {"model_name": "a"})
    assert counted == (1 if error is None else None)


def test_batches_are_told_by_the_engine() -> None:
    _, arrays, registry = make()
    arrays.take(Outputs([], EngineStats(), [], ArrayBatch("a", 3, 100, 104, 0.5)))
    arrays.take(Outputs([], EngineStats(), [ArrayOutput("nobody's")]))  # a refusal comes without one
    arrays.take(Outputs([], EngineStats(), [], ArrayBatch("a", 1, 20, 20, 0.25)))
    values = {
        name: registry.get_sample_value(f"fastserve_array_{name}", {"model_name": "a"})
        for name in ("tokens_total", "padding_tokens_total", "step_seconds_total", "batch_requests_sum")
    }
    assert values == {
        "tokens_total": 120,
        "padding_tokens_total": 4,
        "step_seconds_total": 0.75,
        "batch_requests_sum": 4,
    }


def test_who_has_no_answer_yet_is_shown_by_model() -> None:
    async def main() -> None:
        _, arrays, registry = make()
        arrays.on_ready(Ready(0, 0, "", [ModelInfo(name, "encoder", 10) for name in "ab"]))
        task = asyncio.create_task(arrays.run([PoolingRequest(name, "a", [1]) for name in "12"]))
        await asyncio.sleep(0)
        live = {name: registry.get_sample_value("fastserve_array_requests_live", {"model_name": name}) for name in "ab"}
        assert live == {"a": 2, "b": 0}
        arrays.take(Outputs([], EngineStats(), [ArrayOutput("1"), ArrayOutput("2")], ArrayBatch("a", 2, 2, 2, 0.1)))
        await task
        assert registry.get_sample_value("fastserve_array_requests_live", {"model_name": "a"}) == 0

    asyncio.run(main())
