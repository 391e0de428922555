"""An encoder's queue: what a step takes, by budget, priority and kind; limits of its own; and answers as if alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastserve.core.arrays import ModelSpec, PoolingRequest
from fastserve.core.errors import MemoryPlanError, RequestError
from fastserve.engine import pooling_runtime
from fastserve.engine.array_codec import to_numpy
from fastserve.engine.pooling_runtime import PoolingRuntime
from tests import encoder_folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_folders.encoder(tmp_path_factory.mktemp("pooling"), "Bert", "ForTokenClassification")


def make(folder: Path, **options: Any) -> PoolingRuntime:
    return PoolingRuntime(ModelSpec("a", {"model": str(folder), "dtype": "float32", **options}))


def ask(name: str, length: int, **options: Any) -> PoolingRequest:
    return PoolingRequest(name, "a", [5 + (place * 7 + length) % 200 for place in range(length)], **options)


def step(runtime: PoolingRuntime) -> list[str]:
    return [output.request_id for output in runtime.step()]


def test_a_lone_request_is_taken_at_once_and_batches_grow_with_what_waits(folder: Path) -> None:
    runtime = make(folder)
    runtime.add(ask("first", 9))
    assert step(runtime) == ["first"] and not runtime.has_work()
    names = [str(number) for number in range(20)]
    for name in names:  # they came while the first was computed
        runtime.add(ask(name, 10))
    assert step(runtime) == names and not runtime.has_work()
    assert runtime.num_tokens == runtime.num_computed == 209  # no padding


def test_a_batch_ends_at_the_token_budget(folder: Path) -> None:
    runtime = make(folder, max_batch_tokens=160, max_model_len=160)
    for name, length in [("a", 100), ("b", 60), ("c", 1), ("d", 160)]:
        runtime.add(ask(name, length))
    assert [step(runtime), step(runtime), step(runtime)] == [["a", "b"], ["c"], ["d"]]


def test_one_text_longer_than_the_budget_goes_alone(folder: Path) -> None:
    runtime = make(folder, max_batch_tokens=64)
    runtime.add(ask("short", 5))
    runtime.add(ask("long", 160))
    runtime.add(ask("other", 5))
    assert [step(runtime), step(runtime), step(runtime)] == [["short"], ["long"], ["other"]]


def test_urgent_requests_go_first_and_kinds_are_not_mixed(folder: Path) -> None:
    runtime = make(folder)
    runtime.add(ask("later", 5, priority=1, arrival_time=1.0, head="embed"))
    runtime.add(ask("second", 5, arrival_time=3.0))
    runtime.add(ask("first", 5, arrival_time=2.0))
    runtime.add(ask("left", 5, arrival_time=4.0))
    runtime.abort(["left", "nobody's"])
    assert runtime.num_waiting == 3
    assert step(runtime) == ["first", "second"]
    assert step(runtime) == ["later"]


def test_answers_are_those_of_each_alone(folder: Path) -> None:
    together, alone = make(folder, max_batch_tokens=256), make(folder)
    requests = [ask(str(length), length) for length in (3, 48, 49, 64, 65, 127, 1)]
    expected = {}
    for request in requests:
        alone.add(request)
        [output] = alone.step()
        expected[request.request_id] = to_numpy(output.arrays[""])
        together.add(request)
    while together.has_work():
        for output in together.step():
            np.testing.assert_allclose(to_numpy(output.arrays[""]), expected[output.request_id], atol=1e-5)


def test_each_model_has_limits_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = make(folder, max_model_len=16)
    assert runtime.info.max_len == 16 and make(folder).info.max_len == 160
    runtime.add(ask("fits", 16))
    with pytest.raises(RequestError, match="1 to 16 tokens, not 17"):
        runtime.add(ask("long", 17))
    with pytest.raises(RequestError, match="1 to 16 tokens, not 0"):
        runtime.add(ask("empty", 0))
    with pytest.raises(RequestError, match="between 0 and"):
        runtime.add(PoolingRequest("ids", "a", [10**6]))
    with pytest.raises(RequestError, match="token types must be as many"):
        runtime.add(PoolingRequest("types", "a", [5, 6], [0]))
    with pytest.raises(RequestError, match="for one of scores, embed, hidden"):
        runtime.add(ask("head", 5, head="tail"))
    monkeypatch.setattr(pooling_runtime, "MAX_FRAME_BYTES", 64)
    for head in ("scores", "hidden"):
        with pytest.raises(RequestError, match="the answer would take"):
            runtime.add(ask("large", 16, head=head))
    runtime.add(ask("small", 16, head="embed"))
    runtime.abort(["small"])
    with pytest.raises(RequestError, match="rows must be places"):
        runtime.add(ask("rows", 5, rows=[5]))
    assert step(runtime) == ["fits"]


def test_what_does_not_fit_into_memory_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling_runtime, "free_memory", lambda device: 1000)
    with pytest.raises(MemoryPlanError, match="unload another model"):
        make(folder)
