"""A trace over HTTP: arrivals, lengths and failures, against a server that counts."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastserve.bench import serve_trace
from fastserve.core.errors import ConfigError


class Server:
    """Answers completions with as many pieces as asked for; prompts of 13 tokens get an error."""

    def __init__(self) -> None:
        self.bodies: list[tuple[float, dict]] = []
        self.loop = asyncio.new_event_loop()
        self.server = self.loop.run_until_complete(asyncio.start_server(self.answer, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        if head.startswith("get"):
            models = json.dumps({"data": [{"id": "tiny"}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(models) + models)
        else:
            body = json.loads(await reader.readexactly(int(head.split("content-length: ")[1].split("\r\n")[0])))
            self.bodies.append((time.monotonic(), body))
            events = [{"choices": [{"text": "x"}]}] * body["max_tokens"]
            events.append({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
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


def test_no_server_is_said(tmp_path: Path) -> None:
    trace = write(tmp_path / "trace.csv", [5, 6])
    with pytest.raises(ConfigError, match="is a server running"):
        serve_trace.run(trace, url="http://127.0.0.1:9", num_requests=2)
    with pytest.raises(ConfigError, match="http://host:port"):
        serve_trace.run(trace, url="localhost:8000", num_requests=2)
