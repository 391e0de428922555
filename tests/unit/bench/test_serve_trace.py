"""A trace over HTTP: arrivals, lengths and failures, against a server that counts."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastserve.bench import serve_trace
from fastserve.bench.traces import read_trace
from fastserve.core.errors import ConfigError


class Server:
    """Answers completions with as many pieces as asked for; prompts of 13 tokens get an error, and those of 17 a piece
    too few. Asks for a key if it has one."""

    def __init__(self) -> None:
        self.key = ""
        self.bodies: list[tuple[float, dict]] = []
        self.loop = asyncio.new_event_loop()
        self.server = self.loop.run_until_complete(asyncio.start_server(self.answer, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        if self.key and f"authorization: bearer {self.key}" not in head:
            writer.write(b"HTTP/1.1 401 Who\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        elif head.startswith("get"):
            models = json.dumps({"data": [{"id": "tiny"}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(models) + models)
        else:
            body = json.loads(await reader.readexactly(int(head.split("content-length: ")[1].split("\r\n")[0])))
            self.bodies.append((time.monotonic(), body))
            count = body["max_tokens"] - (len(body["prompt"]) == 17)
            events = [{"choices": [{"text": "x"}]}] * count
            events.append({"choices": [], "usage": {"completion_tokens": count}})
            lines = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
            status = b"500 Oops" if len(body["prompt"]) == 13 else b"200 OK"
            writer.write(b"HTTP/1.1 " + status + b"\r\nconnection: close\r\n\r\n" + lines.encode())
        await writer.drain()
        writer.close()


@pytest.fixture()
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.loop.run_forever)
    thread.start()
    yield made
    made.loop.call_soon_threadsafe(made.loop.stop)
    thread.join()
    made.server.close()
    made.loop.close()


def write(path: Path, prompts: list[int]) -> str:
    rows = "".join(f"{index},c,{length},{index + 1}\n" for index, length in enumerate(prompts))
    path.write_text("arrival_s,client_id,input_tokens,output_tokens\n" + rows)
    return str(path)


def test_requests_go_out_at_their_times_with_their_lengths(server: Server, tmp_path: Path) -> None:
    trace = write(tmp_path / "trace.csv", [5, 6, 13, 8])
    report = serve_trace.run(trace, url=server.url, rate=10.0, num_requests=4)
    bodies = sorted(server.bodies, key=lambda item: item[0])
    assert [body["max_tokens"] for _, body in bodies] == [1, 2, 3, 4]
    assert [len(body["prompt"]) for _, body in bodies] == [5, 6, 13, 8]
    assert bodies[0][1]["model"] == "tiny" and bodies[0][1]["ignore_eos"]
    assert bodies[3][0] - bodies[0][0] == pytest.approx(0.3, abs=0.15)
    assert report["metrics"]["failed"] == 1  # and is in no figure
    assert report["metrics"]["output_tokens_per_s"] > 0


def test_capacity_is_measured_when_no_rate_is_given(server: Server, tmp_path: Path) -> None:
    trace = write(tmp_path / "trace.csv", [5, 6, 7, 8, 9, 10])
    report = serve_trace.run(trace, url=server.url, load=0.5, num_requests=6, max_batch_sequences=2)
    assert len(server.bodies) == 12
    assert report["config"]["requests_per_s"] == pytest.approx(
        0.5 * report["config"]["capacity_requests_per_s"], rel=0.01
    )


def test_short_answers_are_failures_in_the_capacity_run_too(server: Server, tmp_path: Path) -> None:
    trace = write(tmp_path / "trace.csv", [5, 17, 13, 8])
    report = serve_trace.run(trace, url=server.url, num_requests=4, server_options=["--scheduler", "fcfs"])
    assert report["metrics"]["failed"] == report["metrics"]["capacity_failed"] == 2
    assert report["skipped"]["capacity_failed requests"] == "2 of 4; request 1: 1 tokens instead of 2"
    assert report["config"]["server_options"] == ["--scheduler", "fcfs"]
    first, second = server.bodies[:4], server.bodies[4:]
    assert not {str(body["prompt"]) for _, body in first} & {str(body["prompt"]) for _, body in second}


def test_prompts_are_ready_before_the_clock_starts(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(serve_trace, "prompt_ids", lambda *_: order.append("prompt") or [1])
    clock = SimpleNamespace(perf_counter=lambda: order.append("clock") or time.perf_counter())
    monkeypatch.setattr(serve_trace, "time", clock)
    client = serve_trace.StreamingClient("127.0.0.1", int(server.url.rpartition(":")[2]))
    trace = read_trace(write(tmp_path / "trace.csv", [5, 6])).all_at_once()
    times, errors = serve_trace.replay(client, "tiny", trace, seed=0)
    assert len(times) == 2 and not errors
    assert order == ["prompt"] * 2 + ["clock"] * 3


def test_the_key_of_the_environment_is_sent(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = write(tmp_path / "trace.csv", [5, 6])
    server.key = "secret"
    with pytest.raises(ConfigError, match="set FASTSERVE_API_KEY"):
        serve_trace.run(trace, url=server.url, rate=10.0, num_requests=2)
    monkeypatch.setenv("FASTSERVE_API_KEY", "secret")
    assert serve_trace.run(trace, url=server.url, rate=10.0, num_requests=2)["metrics"]["failed"] == 0


def test_no_server_is_said(tmp_path: Path) -> None:
    trace = write(tmp_path / "trace.csv", [5, 6])
    with pytest.raises(ConfigError, match="is a server running"):
        serve_trace.run(trace, url="http://127.0.0.1:9", num_requests=2)
    for numbers in ({"load": 0.0}, {"load": float("nan")}, {"rate": -5.0}):
        with pytest.raises(ConfigError, match="above 0"):
            serve_trace.run(trace, url="http://127.0.0.1:9", num_requests=2, **numbers)
    with pytest.raises(ConfigError, match="http://host:port"):
        serve_trace.run(trace, url="localhost:8000", num_requests=2)
