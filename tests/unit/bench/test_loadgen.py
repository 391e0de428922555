"""The load generator against a server that answers with prepared bytes."""

from __future__ import annotations

import asyncio
import json
import math

import pytest

from fastserve.bench.loadgen import StreamingClient, StreamResult


def event(**fields) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def chunked(parts: list[bytes]) -> bytes:
    return b"".join(f"{len(part):x}\r\n".encode() + part + b"\r\n" for part in parts) + b"0\r\n\r\n"


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
USAGE = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}


def fetch(answer: bytes, timeout: float = 5.0, hang: bool = False) -> tuple[StreamResult, bytes]:
    """Send one request to a server that answers `answer`; returns the result and what the server was sent."""
    received = b""

    async def run() -> StreamResult:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal received
            received = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in received.split(b"\r\n") if line.lower().startswith(b"content-length"))
            received += await reader.readexactly(int(length.split(b":")[1]))
            writer.write(answer)
            await writer.drain()
            if hang:
                await reader.read()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            return await StreamingClient("127.0.0.1", port, "key", timeout).stream("/v1/completions", {"prompt": "x"})

    return asyncio.run(run()), received


def test_stream_split_at_any_byte_gives_the_same_pieces() -> None:
    events = [event(choices=[{"text": text, "finish_reason": None}]) for text in ("Once", " ü", "pon")]
    events.append(event(choices=[{"text": "", "finish_reason": "length"}]))
    body = b"".join([*events, event(choices=[], usage=USAGE), b"data: [DONE]\n\n"])
    for size in (1, 7, len(body)):
        result, sent = fetch(HEAD + chunked([body[i : i + size] for i in range(0, len(body), size)]))
        assert (result.status, result.error, result.is_done) == (200, "", True)
        assert result.pieces == ["Once", " ü", "pon", ""]
        assert result.finish_reason == "length"
        assert result.num_tokens == 3
        assert result.started <= result.times[0] <= result.times[-1] <= result.ended
        assert result.tpot == pytest.approx((result.times[-1] - result.times[0]) / 2)
    assert b"Authorization: Bearer key" in sent
    assert json.loads(sent.split(b"\r\n\r\n", 1)[1])["stream_options"] == {"include_usage": True}


def test_chat_deltas() -> None:
    body = event(choices=[{"delta": {"role": "assistant"}}]) + event(choices=[{"delta": {"content": "Hi"}}])
    result, _ = fetch(HEAD + chunked([body + b"data: [DONE]\n\n"]))
    assert result.text == "Hi" and len(result.times) == 1


def test_failures_are_named() -> None:
    refused = b'HTTP/1.1 429 Too Many Requests\r\ncontent-length: 13\r\n\r\n{"error":"x"}'
    assert fetch(refused)[0].error == 'HTTP 429: {"error":"x"}'
    assert "without [DONE]" in fetch(HEAD + chunked([event(choices=[{"text": "a"}])]))[0].error
    assert "engine died" in fetch(HEAD + chunked([event(error={"message": "engine died"})]))[0].error
    assert "IncompleteRead" in fetch(HEAD + b"ff\r\ndata: ")[0].error
    odd_events: list[object] = [[1], {"choices": [{"delta": None}]}, {"choices": [7]}, {"usage": {"tokens": 3}}, "text"]
    for odd in odd_events:
        assert "Error" in fetch(HEAD + chunked([b"data: " + json.dumps(odd).encode() + b"\n\n"]))[0].error, odd
    assert "LimitOverrunError" in fetch(HEAD + b"f" * (5 << 20))[0].error
    silent, _ = fetch(HEAD, timeout=0.2, hang=True)
    assert "no end" in silent.error and math.isnan(silent.ttft)


def test_no_server() -> None:
    result = asyncio.run(StreamingClient("127.0.0.1", 1).stream("/", {}))
    assert result.status == 0 and "Error" in result.error
