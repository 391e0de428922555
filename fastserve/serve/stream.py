"""Server-sent events with little work per event, and the end of work whose client has gone.

A plain ASGI response in place of the framework's StreamingResponse: events are ready-made bytes and each costs one
send. While the body is made, the connection is watched, so that a client which vanishes frees the engine at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastserve.serve.errors import as_api_error, error_json

DONE = b"data: [DONE]\n\n"
_Result = TypeVar("_Result")


class ClientGoneError(Exception):
    """The client closed the connection before its answer was ready."""


class EventStream(Response):
    """Sends `events` (each a complete `data: ...` block) and then `done`.

    An exception in `events` becomes a last event in OpenAI's error form: the status line has been sent by then.
    `close` is called at the end in any case, also when the client was gone before the first event.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        close: Callable[[], None],
        headers: dict[str, str] | None = None,
        done: bytes = DONE,
    ) -> None:
        self._events = events
        self._done = done
        self._close = close
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send_all(send))
        except ClientGoneError:
            pass
        finally:
            self._close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events) as events:
            try:
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except Exception as error:
                last = b"data: " + error_json(as_api_error(error)) + b"\n\n"
                await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": self._done, "more_body": False})


async def while_connected(receive: Receive, work: Coroutine[Any, Any, _Result]) -> _Result:
    """The result of `work`, which is cancelled as soon as the client goes away.

    Raises:
        ClientGoneError: the client went away first.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGoneError
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.wait((working, watching))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
