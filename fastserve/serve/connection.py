"""One connection: uvicorn's HTTP protocol with limits on how long and how large the client's side of it may be.

uvicorn bounds idle connections, but neither half-sent headers nor readers who do not read, so that anyone could hold
connections open for nothing. Here headers must arrive in time and within a size (431), answers must be read in time,
and there are only so many connections (503). Bodies are bounded in `limits.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from http import HTTPStatus
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from fastserve.serve.errors import ApiError, error_json
from fastserve.serve.limits import MAX_HEADER_BYTES, MAX_URL_BYTES

# What may arrive before the headers are whole: room for the limits of `limits.py`, names and separators.
_MAX_HEAD_BYTES = 2 * (MAX_HEADER_BYTES + MAX_URL_BYTES)


class BoundedConnection(HttpToolsProtocol):
    """Closes a connection whose headers are not there within `header_seconds`, or whose answer is not read within
    `write_seconds`."""

    header_seconds: ClassVar[float] = 10.0
    write_seconds: ClassVar[float] = 60.0
    max_connections: ClassVar[int] = 1_000_000
    _deadline: asyncio.TimerHandle | None = None
    _write_deadline: asyncio.TimerHandle | None = None
    _num_head_bytes = 0
    _cycles: Sequence[RequestResponseCycle] = ()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._refuse(ApiError("too many connections", 503, retry_after=1))
        self._arm()

    def data_received(self, data: bytes) -> None:
        if self._deadline is not None:  # inside of a head
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self._deadline is not None and self._num_head_bytes > _MAX_HEAD_BYTES:
            self._refuse(ApiError(f"headers of more than {MAX_HEADER_BYTES} bytes", 431))

    def on_message_begin(self) -> None:
        self._arm()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._disarm()
        super().on_headers_complete()
        self._cycles = [*(cycle for cycle in self._cycles if not cycle.response_complete), self.cycle]

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._stop_writing()
        # uvicorn tells the newest request only, and with pipelining that is not the one which is being answered.
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client reads more slowly than we write."""
        super().pause_writing()
        self._stop_writing()
        self._write_deadline = self.loop.call_later(self.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop_writing()
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        # Closing waits until everything was read.
        self._write_deadline = self.loop.call_later(self.write_seconds, self.transport.abort)

    def _refuse(self, error: ApiError) -> None:
        body = error_json(error)
        status = HTTPStatus(error.http_status)
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\nConnection: close\r\n"
        self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()

    def _arm(self) -> None:
        self._disarm()
        self._num_head_bytes = 0
        self._deadline = self.loop.call_later(self.header_seconds, self.transport.close)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _stop_writing(self) -> None:
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None
