"""Requests that are answered once: answers, refusals, deaths of the engine, cancelling, loading and unloading."""

from __future__ import annotations

import asyncio

import pytest

from fastserve.core.arrays import Array, ArrayOutput, ModelInfo, ModelSpec, PoolingRequest
from fastserve.core.errors import CheckpointError, ConfigError, EngineDeadError, FastServeError, RequestError
from fastserve.engine.array_client import ArrayClient
from fastserve.engine.messages import Abort, Add, EngineStats, Load, Loaded, Outputs, Ready, Unload

VECTOR = Array("float32", [1], bytes(4))


class Link:
    """An engine that is there or not; `sent` are the frames."""

    def __init__(self, is_ready: bool = True) -> None:
        self.sent: list[object] = []
        self.is_ready = is_ready
        self.client = ArrayClient([ModelSpec("a", {"model": "folder"})], self.send, max_deaths=2)

    def send(self, frame: object) -> bool:
        if self.is_ready:
            self.sent.append(frame)
        return self.is_ready

    def ready(self, *names: str) -> None:
        self.is_ready = True
        self.client.on_ready(Ready(0, 0, "", [ModelInfo(name, "encoder", 10) for name in names]))

    def die(self) -> None:
        self.is_ready = False
        self.client.on_death()

    async def run(self, *names: str) -> asyncio.Task[list[ArrayOutput]]:
        task = asyncio.create_task(self.client.run([PoolingRequest(name, "a", [1]) for name in names]))
        await asyncio.sleep(0)
        return task


def answered(*names: str) -> Outputs:
    return Outputs([], EngineStats(), [ArrayOutput(name, {"": VECTOR}) for name in names])


def test_answers_come_in_the_order_of_the_requests() -> None:
    async def main() -> None:
        link = Link()
        task = await link.run("1", "2", "3")
        assert [frame.request.request_id for frame in link.sent] == ["1", "2", "3"] and link.client.num_live == 3
        link.client.take(answered("3", "1", "nobody's"))
        link.client.take(answered("2", "2"))
        assert [output.request_id for output in await task] == ["1", "2", "3"]
        assert link.client.num_live == 0 and not any(isinstance(frame, Abort) for frame in link.sent)

    asyncio.run(main())


@pytest.mark.parametrize("is_refused", [True, False])
def test_one_error_ends_the_group(is_refused: bool) -> None:
    async def main() -> None:
        link = Link()
        task = await link.run("1", "2")
        link.client.take(Outputs([], EngineStats(), [ArrayOutput("2", error="no", is_refused=is_refused)]))
        with pytest.raises(FastServeError, match="no") as failure:
            await task
        assert isinstance(failure.value, RequestError) is is_refused
        assert link.sent[-1] == Abort(["1"]) and link.client.num_live == 0

    asyncio.run(main())


def test_who_cancels_is_not_computed() -> None:
    async def main() -> None:
        link = Link()
        task = await link.run("1", "2")
        link.client.take(answered("1"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert link.sent[-1] == Abort(["2"]) and link.client.num_live == 0
        link.client.take(answered("2"))  # it was on its way

    asyncio.run(main())


def test_a_dead_engine_loses_nothing_until_it_dies_too_often() -> None:
    async def main() -> None:
        link = Link(is_ready=False)
        task = await link.run("1")
        link.die()  # before it was sent: no death of its own
        link.ready("a")
        link.die()
        link.ready("a")
        assert [type(frame) for frame in link.sent] == [Add, Add]
        link.client.take(answered("1"))
        assert len(await task) == 1
        other = await link.run("2")
        link.die()
        link.ready("a")
        link.die()
        with pytest.raises(EngineDeadError, match="died 2 times"):
            await other

    asyncio.run(main())


def test_models_are_loaded_and_unloaded() -> None:
    async def main() -> None:
        link = Link()
        link.ready("a")
        loading = asyncio.create_task(link.client.load(ModelSpec("b", {})))
        await asyncio.sleep(0)
        assert link.sent == [Load(ModelSpec("b", {}))] and "b" not in link.client.specs
        with pytest.raises(ConfigError, match="already"):
            await link.client.load(ModelSpec("b", {}))
        link.client.take_loaded(Loaded("b", ModelInfo("b", "encoder", 7)))
        assert (await loading).max_len == 7 and list(link.client.specs) == ["a", "b"]  # of the next process, too
        waiting = await link.run("1")
        link.client.unload("a")
        assert link.sent[-1] == Unload("a") and list(link.client.models) == ["b"]
        with pytest.raises(RequestError, match="was unloaded"):
            await waiting
        with pytest.raises(ConfigError, match="no model 'a'"):
            link.client.unload("a")

    asyncio.run(main())


def test_a_model_that_cannot_be_loaded_is_told_of() -> None:
    async def main() -> None:
        link = Link()
        loading = asyncio.create_task(link.client.load(ModelSpec("b", {})))
        await asyncio.sleep(0)
        link.client.take_loaded(Loaded("b", error="damaged", kind="CheckpointError"))
        with pytest.raises(CheckpointError, match="damaged"):
            await loading
        loading = asyncio.create_task(link.client.load(ModelSpec("b", {})))
        await asyncio.sleep(0)
        link.die()
        with pytest.raises(EngineDeadError, match="while it loaded"):
            await loading
        with pytest.raises(EngineDeadError, match="not running"):
            await link.client.load(ModelSpec("b", {}))
        assert list(link.client.specs) == ["a"]

    asyncio.run(main())
