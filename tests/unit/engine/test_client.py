"""EngineClient and the process loop against a fake engine process: real sockets, real signals, no model."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from contextlib import asynccontextmanager

import msgspec
import pytest

from fastserve.core.arrays import Array, ArrayBatch, ArrayOutput, PoolingRequest
from fastserve.core.config import EngineConfig
from fastserve.core.errors import CheckpointError, EngineDeadError, QueueFullError, RequestError
from fastserve.core.request import Request, TokenOutput
from fastserve.core.sampling_params import SamplingParams
from fastserve.engine import messages, process
from fastserve.engine.client import EngineClient, EngineState, RestartPolicy
from fastserve.engine.link import EngineLink
from fastserve.engine.token_stream import TokenStream, merge
from tests.unit.engine.fake_engine import COMMAND, CRASH, HANG, MAX_MODEL_LEN, RAISE, REFUSE, WAIT

QUICK = RestartPolicy(delays=(0.05,))


def request(name: str, prompt: list[int], max_tokens: int = 5) -> Request:
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, seed=0), time.monotonic())


@asynccontextmanager
async def running(config: EngineConfig | None = None, **options):
    client = EngineClient(config or EngineConfig(), command=COMMAND, **{"restarts": QUICK, **options})
    await asyncio.wait_for(client.start(), 20)
    try:
        yield client
    finally:
        await client.close()


async def read(stream: TokenStream) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    async for output in stream:
        tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return tokens


async def until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def test_streams_tokens_of_a_group_in_order():
    async def scenario():
        async with running() as client:
            assert client.state is EngineState.READY
            assert client.ready.max_model_len == MAX_MODEL_LEN
            tokens = await read(client.stream(request("a", [1, 2, 3]), request("b", [7], max_tokens=2)))
            assert tokens == {"a": [1, 2, 3, 1, 2], "b": [7, 7]}
            assert client.num_live == 0
            await until(lambda: client.stats.generation_tokens == 7)

    run(scenario())


def test_start_reports_the_engines_own_error():
    async def scenario():
        client = EngineClient(EngineConfig(model="broken"), command=COMMAND)
        with pytest.raises(CheckpointError, match="damaged"):
            await client.start()
        assert client.state is EngineState.DEAD
        with pytest.raises(EngineDeadError):
            client.stream(request("a", [1]))
        await client.close()

    run(scenario())


def test_close_does_not_wait_for_a_model_that_is_being_loaded(monkeypatch):
    monkeypatch.setenv("FAKE_ENGINE_LOAD", "60")

    async def scenario():
        client = EngineClient(EngineConfig(), command=COMMAND)
        starting = asyncio.create_task(client.start())
        await until(lambda: client.process_id is not None)
        process_id = client.process_id
        starting.cancel()
        await asyncio.wait_for(client.close(), 30)
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)

    run(scenario())


def test_requests_taken_while_it_restarts_are_served_after():
    async def scenario():
        async with running() as client:
            os.kill(client.process_id, signal.SIGKILL)
            await until(lambda: client.state is EngineState.RESTARTING)
            assert await read(client.stream(request("a", [4], max_tokens=2))) == {"a": [4, 4]}
            assert client.num_restarts == 1
            await until(lambda: client.totals.generation_tokens == 2)

    run(scenario())


def test_start_of_a_program_that_just_dies_says_how_it_ended():
    async def scenario():
        client = EngineClient(EngineConfig(), command=[sys.executable, "-c", "raise SystemExit(7)"])
        with pytest.raises(EngineDeadError, match="exit status 7"):
            await client.start()

    run(scenario())


def test_a_program_that_cannot_be_started_leaves_no_socket_open(monkeypatch):
    pairs, make_pair = [], socket.socketpair
    monkeypatch.setattr(socket, "socketpair", lambda: pairs.append(make_pair()) or pairs[-1])
    with pytest.raises(FileNotFoundError):
        asyncio.run(EngineLink.open(["/no/such/program"]))
    assert [end.fileno() for end in pairs[-1]] == [-1, -1]


def test_kill_9_ends_running_streams_and_keeps_the_waiting_ones():
    async def scenario():
        async with running(EngineConfig(max_batch_sequences=1, max_batch_tokens=8)) as client:
            first = client.stream(request("first", [1], max_tokens=100_000))
            waiting = client.stream(request("waiting", [2, 3], max_tokens=4))
            assert (await anext(first)).token_ids
            old = client.process_id
            os.kill(old, signal.SIGKILL)
            with pytest.raises(EngineDeadError, match="died"):
                await asyncio.wait_for(read(first), 30)
            assert client.state is EngineState.RESTARTING
            assert await read(waiting) == {"waiting": [2, 3, 2, 3]}
            assert client.state is EngineState.READY
            assert client.process_id != old

    run(scenario())


def test_a_group_ends_as_a_whole_when_the_engine_dies():
    async def scenario():
        async with running(EngineConfig(max_batch_sequences=1, max_batch_tokens=8)) as client:
            group = client.stream(request("a", [1], max_tokens=100_000), request("b", [2], max_tokens=100_000))
            assert (await anext(group)).request_id == "a"
            os.kill(client.process_id, signal.SIGKILL)
            with pytest.raises(EngineDeadError):
                await read(group)
            assert client.num_live == 0

    run(scenario())


def test_an_exception_in_a_step_ends_the_process_and_is_told():
    async def scenario():
        async with running() as client:
            with pytest.raises(EngineDeadError):
                await read(client.stream(request("bad", [RAISE])))
            assert await read(client.stream(request("next", [5], max_tokens=1))) == {"next": [5]}

    run(scenario())


def test_a_refused_request_leaves_the_others_alone():
    async def scenario():
        async with running() as client:
            good = client.stream(request("good", [4], max_tokens=50))
            bad = [output async for output in client.stream(request("bad", [REFUSE]))]
            assert [(output.finish_reason, output.error) for output in bad] == [("error", "this one is refused")]
            assert await read(good) == {"good": [4] * 50}

    run(scenario())


def test_what_is_too_large_to_be_sent_ends_alone(monkeypatch):
    monkeypatch.setattr(messages, "MAX_FRAME_BYTES", 2000)
    array, batch = Array("uint8", [900], bytes(900)), ArrayBatch("m", 5, 0, 0, 0.0)
    made = [ArrayOutput("a", {"": array}), ArrayOutput("b", {"": array})]
    made += [ArrayOutput("big", {"": Array("uint8", [3000], bytes(3000))})]
    made += [TokenOutput("c", [1]), TokenOutput("long", [1] * 3000)]
    sent, aborted = [], []

    class Engine:
        def has_work(self):
            return not sent

        def step(self):
            return made

        def tend(self):
            return []

        def take_batch(self):
            return batch

        def stats(self):
            return messages.EngineStats()

        def abort(self, request_ids):
            aborted.extend(request_ids)

    class Link:
        def receive(self, timeout):
            return [messages.Shutdown()] if sent else []

        def send(self, message):
            messages.encode_frame(message)
            sent.append(message)

    process.run(Link(), Engine())
    answers = {output.request_id: output for frame in sent for output in [*frame.answers, *frame.outputs]}
    assert list(answers) == ["a", "b", "big", "c", "long"] and aborted == ["big", "long"]
    for name in ("big", "long"):
        assert answers[name].is_refused and "more than the 2000" in answers[name].error
    assert answers["b"].arrays == {"": array} and answers["c"].token_ids == [1]
    assert [frame.batch for frame in sent if frame.batch] == [batch]  # counted once


def test_what_no_engine_takes_is_refused_at_once():
    async def scenario():
        async with running() as client:
            bad = msgspec.structs.replace(request("bad", [1]), priority=10**30)
            for is_ready in (True, False):
                with pytest.raises(RequestError, match="cannot be sent"):
                    await client.run([PoolingRequest("bad", "m", [1], priority=10**30)])
                with pytest.raises(RequestError, match="cannot be sent"):
                    client.stream(request("good", [1]), bad)
                assert client.num_live == 0
                if is_ready:
                    os.kill(client.process_id, signal.SIGKILL)
                    await until(lambda: client.state is EngineState.RESTARTING)
            assert await read(client.stream(request("a", [4], max_tokens=2))) == {"a": [4, 4]}

    run(scenario())


def test_gives_up_after_too_many_deaths():
    async def scenario():
        async with running(restarts=RestartPolicy(delays=(0.01,), max_deaths=2)) as client:
            for name in "ab":
                with pytest.raises(EngineDeadError):
                    await read(client.stream(request(name, [CRASH])))
            await asyncio.wait_for(client.wait_dead(), 60)
            assert client.state is EngineState.DEAD
            with pytest.raises(EngineDeadError):
                client.stream(request("c", [1]))

    run(scenario())


def test_deaths_are_forgotten_after_a_healthy_while():
    async def scenario():
        async with running(restarts=RestartPolicy(delays=(0.01,), max_deaths=2, healthy_after=0.0)) as client:
            for name in "abcd":
                with pytest.raises(EngineDeadError):
                    await read(client.stream(request(name, [CRASH])))
            assert await read(client.stream(request("e", [9], max_tokens=1))) == {"e": [9]}

    run(scenario())


def test_a_failing_restart_counts_as_a_death(tmp_path, monkeypatch):
    flag = tmp_path / "fails"
    monkeypatch.setenv("FAKE_ENGINE_FAILS", str(flag))

    async def scenario():
        async with running(restarts=RestartPolicy(delays=(0.01,), max_deaths=3)) as client:
            flag.touch()
            os.kill(client.process_id, signal.SIGKILL)
            await asyncio.wait_for(client.wait_dead(), 20)

    run(scenario())


def test_a_request_that_waits_in_dying_engines_is_not_tried_for_ever():
    async def scenario():
        policy = RestartPolicy(delays=(0.01,), max_deaths_per_request=2, healthy_after=0.0)
        async with running(restarts=policy) as client:
            stream = client.stream(request("unlucky", [WAIT]))
            for _ in range(2):
                await until(lambda: client.state is EngineState.READY)
                os.kill(client.process_id, signal.SIGKILL)
                await until(lambda: client.state is EngineState.RESTARTING)
            with pytest.raises(EngineDeadError, match="2 times"):
                await read(stream)

    run(scenario())


@pytest.mark.slow
def test_a_stuck_engine_is_killed_and_started_again():
    async def scenario():
        async with running(stall_timeout=1.5) as client:
            old = client.process_id
            with pytest.raises(EngineDeadError):
                await read(client.stream(request("hang", [HANG])))
            assert await read(client.stream(request("next", [5], max_tokens=1))) == {"next": [5]}
            assert client.process_id != old

    run(scenario())


@pytest.mark.slow
def test_an_idle_engine_is_not_taken_for_a_stuck_one():
    async def scenario():
        async with running(stall_timeout=1.2) as client:
            old = client.process_id
            await asyncio.sleep(3)
            assert client.state is EngineState.READY
            assert client.process_id == old

    run(scenario())


def test_full_queue_is_refused_with_a_wait_and_takes_again_later():
    async def scenario():
        config = EngineConfig(max_batch_sequences=1, max_batch_tokens=8, max_waiting=2)
        async with running(config) as client:
            streams = [client.stream(request(f"r{index}", [WAIT])) for index in range(3)]
            with pytest.raises(QueueFullError, match="max_waiting=2") as raised:
                client.stream(request("late", [1]))
            assert 1 <= raised.value.retry_after <= 60
            with pytest.raises(RequestError, match="at most 3"):
                client.stream(*(request(f"x{index}", [1]) for index in range(4)))
            streams[0].close()
            client.stream(request("now", [1])).close()

    run(scenario())


def test_readers_that_go_away_free_the_engine():
    async def scenario():
        async with running() as client:
            closed = client.stream(request("closed", [1], max_tokens=100_000))
            await anext(closed)
            closed.close()
            cancelled = asyncio.create_task(read(client.stream(request("cancelled", [WAIT]))))
            await asyncio.sleep(0.05)
            cancelled.cancel()
            await asyncio.wait([cancelled])
            assert cancelled.cancelled()
            assert client.num_live == 0
            await until(lambda: client.stats.num_running == 0)

    run(scenario())


def test_dropping_one_request_of_a_group_leaves_the_others():
    async def scenario():
        async with running() as client:
            stream = client.stream(request("a", [1], max_tokens=100_000), request("b", [2], max_tokens=20))
            while (await anext(stream)).request_id != "a":
                pass
            stream.drop("a")
            assert set(await read(stream)) <= {"b"}
            assert client.num_live == 0

    run(scenario())


def test_a_slow_reader_gets_merged_tokens_and_holds_up_nobody():
    async def scenario():
        async with running() as client:
            slow = client.stream(request("slow", [1, 2], max_tokens=40))
            quick = await read(client.stream(request("quick", [3], max_tokens=60)))
            assert len(quick["quick"]) == 60
            outputs = [output async for output in slow]
            assert len(outputs) < 10
            assert [token_id for output in outputs for token_id in output.token_ids] == [1, 2] * 20
            assert outputs[-1].finish_reason == "length"

    run(scenario())


def test_the_engine_process_ends_with_its_parent():
    async def scenario():
        async with running() as client:
            process_id = client.process_id
            os.kill(process_id, signal.SIGTERM)  # ignored: the parent decides
            await asyncio.sleep(0.1)
            assert await read(client.stream(request("a", [1], max_tokens=1))) == {"a": [1]}
        with pytest.raises(ProcessLookupError):
            os.kill(process_id, 0)

    run(scenario())


def test_merge_keeps_order_and_the_end():
    first = TokenOutput("a", [1], num_cached_tokens=4, scheduled_time=2.0)
    second = TokenOutput("a", [2, 3], finish_reason="stop", stop_token_id=3)
    merged = merge(first, second)
    assert merged.token_ids == [1, 2, 3]
    assert (merged.finish_reason, merged.stop_token_id) == ("stop", 3)
    assert (merged.num_cached_tokens, merged.scheduled_time) == (4, 2.0)


def test_an_error_that_comes_after_the_end_is_nobodys():
    async def scenario():
        stream = TokenStream(["a"], lambda ids: None)
        stream.push(TokenOutput("a", [1], finish_reason="length"))
        stream.fail(EngineDeadError("late"))
        assert await read(stream) == {"a": [1]}

    run(scenario())
