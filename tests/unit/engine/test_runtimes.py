"""Several models in one engine process: fair shares of step time, refusals, loading and unloading, over fake models."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastserve.core.arrays import Array, ArrayBatch, ArrayOutput, ModelInfo, ModelSpec, PoolingRequest, TensorRequest
from fastserve.core.errors import CheckpointError, ConfigError, RequestError
from fastserve.core.request import Request, TokenOutput
from fastserve.core.sampling_params import SamplingParams
from fastserve.engine.arbiter import Arbiter
from fastserve.engine.array_codec import split_bytes
from fastserve.engine.messages import EngineStats
from fastserve.engine.runtimes import GENERATOR, Runtimes
from fastserve.engine.servable_runtime import ServableRuntime
from tests.encoder_decoder_folders import encoder_decoder


@given(
    st.lists(st.tuples(st.floats(0.001, 0.1), st.sampled_from([0.5, 1.0, 2.0, 4.0])), min_size=2, max_size=5),
)
def test_busy_models_share_time_by_weight(models: list[tuple[float, float]]) -> None:
    """Whatever a step takes, shares differ from the weights' by no more than a step of each."""
    arbiter = Arbiter()
    weights = {str(index): weight for index, (_, weight) in enumerate(models)}
    spent = dict.fromkeys(weights, 0.0)
    while sum(spent.values()) < 100 * max(seconds for seconds, _ in models):
        name = arbiter.pick(weights)
        spent[name] += models[int(name)][0]
        arbiter.charge(name, models[int(name)][0], weights[name])
    shares = [spent[name] / weights[name] for name in weights]
    longest = max(seconds / weight for seconds, weight in models)
    assert max(shares) - min(shares) <= longest + 1e-9


def test_who_was_idle_is_owed_nothing_and_goes_next() -> None:
    arbiter = Arbiter()
    for _ in range(50):
        arbiter.charge(arbiter.pick({"busy": 1.0}), 1.0, 1.0)
    picks = []
    for _ in range(10):
        name = arbiter.pick({"busy": 1.0, "back": 1.0})
        picks.append(name)
        arbiter.charge(name, 1.0, 1.0)
    assert "back" in picks[:2]
    assert 4 <= picks.count("back") <= 6  # not the fifty that it missed


class FakeGenerator:
    """One token per request and step."""

    max_model_len, vocab_size, report = 100, 50, "fake generator"

    def __init__(self) -> None:
        self.requests: list[str] = []

    def add(self, request: Request) -> None:
        self.requests.append(request.request_id)

    def abort(self, request_ids: Iterable[str]) -> None:
        self.requests = [item for item in self.requests if item not in set(request_ids)]

    def has_work(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[TokenOutput]:
        return [TokenOutput(item, [1]) for item in self.requests]

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self.requests))

    def tend(self) -> None:
        pass


class FakeEncoder:
    """Answers with the number of tokens."""

    def __init__(self, spec: ModelSpec) -> None:
        if spec.options.get("model") == "broken":
            raise CheckpointError("the folder is damaged")
        time.sleep(float(spec.options.get("seconds", 0)))
        self.info = ModelInfo(spec.name, "encoder", 10, f"fake {spec.name}")
        self.weight = spec.weight
        self.waiting: list[PoolingRequest] = []
        self.num_tokens = self.num_computed = 0

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    def add(self, request: PoolingRequest) -> None:
        if len(request.input_ids) > 10:
            raise RequestError("too long")
        self.waiting.append(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        self.waiting = [item for item in self.waiting if item.request_id not in set(request_ids)]

    def has_work(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[ArrayOutput]:
        done, self.waiting = self.waiting, []
        num_tokens = sum(len(item.input_ids) for item in done)
        self.num_tokens += num_tokens
        self.num_computed += num_tokens + 1
        return [ArrayOutput(item.request_id, {"": Array("float32", [1], bytes(4))}) for item in done]


def request(name: str, model: str, length: int = 3) -> PoolingRequest:
    return PoolingRequest(name, model, [1] * length)


def generation(name: str) -> Request:
    return Request(name, [1], SamplingParams(n=1, seed=1), 0.0)


def test_models_work_side_by_side() -> None:
    runtimes = Runtimes(FakeGenerator, [ModelSpec("a", {}), ModelSpec("b", {})], FakeEncoder)
    assert [info.name for info in runtimes.models] == ["a", "b"] and runtimes.max_model_len == 100
    assert runtimes.report.splitlines() == ["fake a", "fake b", "fake generator"]
    assert not runtimes.has_work()
    runtimes.add(generation("g"))
    runtimes.add(request("1", "a"))
    runtimes.add(request("2", "b"))
    runtimes.add(request("3", "b"))
    runtimes.abort(["3"])
    outputs = [output for _ in range(3) for output in runtimes.step()]
    assert sorted(output.request_id for output in outputs) == ["1", "2", "g"]
    assert runtimes.has_work() and runtimes.stats().num_running == 1


def test_a_step_without_tokens_is_told_once() -> None:
    now = iter(range(100))
    runtimes = Runtimes(FakeGenerator, [ModelSpec("a", {})], FakeEncoder, clock=lambda: float(next(now)))
    runtimes.add(request("1", "a", 3))
    runtimes.add(request("2", "a", 4))
    runtimes.step()
    assert runtimes.take_batch() == ArrayBatch("a", 2, 7, 8, 1.0)
    assert runtimes.take_batch() is None
    runtimes.add(generation("g"))
    runtimes.step()
    assert runtimes.take_batch() is None


def test_what_cannot_be_served_is_refused() -> None:
    runtimes = Runtimes(None, [ModelSpec("a", {})], FakeEncoder)
    with pytest.raises(RequestError, match="no model of this server generates"):
        runtimes.add(generation("g"))
    with pytest.raises(RequestError, match="no model 'b' here"):
        runtimes.add(request("1", "b"))
    with pytest.raises(RequestError, match="too long"):
        runtimes.add(request("1", "a", 11))
    runtimes.add(request("1", "a"))
    assert runtimes.stats().num_waiting == 1
    runtimes.step()
    assert runtimes.stats().num_steps == 1


def test_models_are_loaded_while_others_work() -> None:
    runtimes = Runtimes(FakeGenerator, [ModelSpec("a", {})], FakeEncoder)
    runtimes.add(generation("g"))
    runtimes.load(ModelSpec("slow", {"seconds": 0.2}, weight=2.0))
    for name in ("slow", "a", GENERATOR):
        with pytest.raises(ConfigError, match="already"):
            runtimes.load(ModelSpec(name, {}))
    news, steps = [], 0
    while not news:
        steps += len(runtimes.step())
        news = runtimes.tend()
    assert steps > 1 and news[0].name == "slow" and news[0].info.max_len == 10
    runtimes.add(request("1", "slow"))
    runtimes.unload("slow")
    assert [info.name for info in runtimes.models] == ["a"]
    with pytest.raises(ConfigError, match="no model 'slow'"):
        runtimes.unload("slow")
    runtimes.load(ModelSpec("bad", {"model": "broken"}))
    while not (news := runtimes.tend()):
        time.sleep(0.001)
    assert news[0].info is None and news[0].kind == "CheckpointError" and "damaged" in news[0].error


NETWORK = """
import fastserve

answers = {1: ["é"], 2: [None, None]}
servable = fastserve.Servable(
    lambda arrays: {"y": answers[len(arrays["x"])]}, {"x": ("uint8", [-1])}, {"y": ("bytes", [-1])}
)
"""


def test_a_network_whose_answer_cannot_be_sent_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "network.py").write_text(NETWORK)
    runtime = ServableRuntime(ModelSpec("a", {"model": f"{tmp_path / 'network.py'}:servable"}))
    outputs = []
    for size in (1, 2):
        runtime.add(TensorRequest(str(size), "a", {"x": Array("uint8", [size], bytes(size))}))
        outputs += runtime.step()
    assert split_bytes(outputs[0].arrays["y"].data) == ["é".encode()]
    assert "a failed: TypeError" in outputs[1].error and not outputs[1].is_refused


def test_the_memory_of_a_model_that_is_unloaded_is_given_back(tmp_path: Path) -> None:
    """At once, though the collector of cycles does not look at what was there when the process was ready."""
    folder = encoder_decoder(tmp_path / "bart", "bart")
    options = {"model": str(folder), "kv_cache_memory": "8MiB", "kv_host_cache": "8MiB", "num_threads": 1}
    runtimes = Runtimes(None, [ModelSpec("a", options)])
    gc.freeze()
    executor = runtimes._others["a"]._engine._executor  # type: ignore[attr-defined]
    kept = [weakref.ref(executor), weakref.ref(executor._runner), weakref.ref(executor._kv_cache)]
    threads = [executor._tiers._thread]
    del executor
    runtimes.unload("a")
    assert [item() for item in kept] == [None] * 3 and not threads[0].is_alive()
    gc.unfreeze()
