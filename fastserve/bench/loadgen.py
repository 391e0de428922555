"""A light client for OpenAI-style streaming endpoints that records when every piece arrived.

Plain asyncio over one connection per request, so that on a small machine the client takes little from the server.
It understands what such servers send: HTTP/1.1 with chunked or plain bodies, server-sent events, and JSON errors.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

_MAX_LINE = 1 << 22
_ODD_ANSWERS = (ValueError, LookupError, TypeError, AttributeError)  # JSON of another form than expected


@dataclass(slots=True)
class StreamResult:
    """What one streaming request gave.

    Attributes:
        status: HTTP status; 0 when the connection failed.
        error: what went wrong, "" when nothing did.
        pieces: the text of each event that had a choice, in order (may be "" while a character is incomplete; a server
            may put several tokens into one).
        times: seconds (time.perf_counter) when each of them arrived.
        tokens: every token's text, where the request asked for logprobs.
        started, ended: the same clock, around the whole request.
        finish_reason: of the last choice.
        usage: the usage object, when the server sent one.
        is_done: the stream ended with [DONE].
    """

    status: int = 0
    error: str = ""
    pieces: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    started: float = 0.0
    ended: float = 0.0
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    is_done: bool = False

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def num_tokens(self) -> int:
        """Completion tokens as the server counted them."""
        return int(self.usage["completion_tokens"]) if self.usage else 0

    @property
    def ttft(self) -> float:
        """Seconds to the first piece; nan without one."""
        return self.times[0] - self.started if self.times else float("nan")

    @property
    def tpot(self) -> float:
        """Seconds per token after the first one: (last - first) / (tokens - 1); nan below two tokens."""
        if self.num_tokens < 2 or not self.times:
            return float("nan")
        return (self.times[-1] - self.times[0]) / (self.num_tokens - 1)


class StreamingClient:
    """Send requests to one server.

    Args:
        host, port: where it listens.
        api_key: sent as a bearer token when given.
        timeout: seconds for one whole request.
    """

    def __init__(self, host: str, port: int, api_key: str = "", timeout: float = 120.0) -> None:
        self._host = host
        self._port = port
        self._api_key = api_key
        self._timeout = timeout

    async def stream(self, path: str, body: dict[str, Any]) -> StreamResult:
        """POST `body` with stream on and usage asked for. Failures are recorded in the result, not raised."""
        result = StreamResult(started=time.perf_counter())
        payload = {**body, "stream": True, "stream_options": {"include_usage": True}}
        try:
            async with asyncio.timeout(self._timeout):
                await self._run(path, payload, result)
        except TimeoutError:
            result.error = f"no end after {self._timeout:g} s"
        except (OSError, EOFError, asyncio.LimitOverrunError, *_ODD_ANSWERS) as error:
            result.error = f"{type(error).__name__}: {error}"
        result.ended = time.perf_counter()
        return result

    async def _run(self, path: str, payload: dict[str, Any], result: StreamResult) -> None:
        reader, writer = await asyncio.open_connection(self._host, self._port, limit=_MAX_LINE)
        try:
            writer.write(self._request(path, json.dumps(payload).encode()))
            await writer.drain()
            result.status, headers = await _read_head(reader)
            lines = _lines(_body(reader, headers))
            if result.status != 200:
                result.error = f"HTTP {result.status}: " + "\n".join([line async for line in lines])
                return
            async for line in lines:
                if line.startswith("data:"):
                    _take(line[5:].strip(), result)
            if not result.is_done and not result.error:
                result.error = "the stream ended without [DONE]"
        finally:
            writer.close()

    def _request(self, path: str, data: bytes) -> bytes:
        head = [
            f"POST {path} HTTP/1.1",
            f"Host: {self._host}:{self._port}",
            "Content-Type: application/json",
            f"Content-Length: {len(data)}",
            "Connection: close",
        ]
        if self._api_key:
            head.append(f"Authorization: Bearer {self._api_key}")
        return "\r\n".join([*head, "", ""]).encode() + data


def _take(data: str, result: StreamResult) -> None:
    """Record one event."""
    if data == "[DONE]":
        result.is_done = True
        return
    event = json.loads(data)
    if "error" in event:
        result.error = json.dumps(event["error"])
        return
    if event.get("usage"):
        int(event["usage"]["completion_tokens"])  # `num_tokens` reads it when it is too late to record a failure
        result.usage = event["usage"]
    for choice in event.get("choices", ()):
        piece = choice["delta"].get("content") if "delta" in choice else choice.get("text")
        if piece is not None:
            result.pieces.append(piece)
            result.times.append(time.perf_counter())
        result.finish_reason = choice.get("finish_reason") or result.finish_reason
        logprobs = choice.get("logprobs") or {}
        result.tokens += logprobs.get("tokens") or [item["token"] for item in logprobs.get("content") or ()]


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = dict(line.split(":", 1) for line in head[1:] if ":" in line)
    return int(head[0].split()[1]), {name.lower(): value.strip() for name, value in headers.items()}


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while data := await reader.read(65536):
            yield data


async def _lines(body: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Lines of the body as soon as they are complete."""
    rest = b""
    async for data in body:
        *complete, rest = (rest + data).split(b"\n")
        for line in complete:
            yield line.decode().rstrip("\r")
    if rest:
        yield rest.decode()
