"""The door: who may come in (API key) and how much they may bring (body size, time).

Two plain ASGI wrappers around the app. Everything is refused by default: with a key set, every path but /health needs
it, whatever routes are added later.
"""

from __future__ import annotations

import asyncio
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastserve.serve.errors import ApiError, error_response

OPEN_PATHS = frozenset({"/health"})
BODY_TIMEOUT_SECONDS = 60.0


class ApiKeyGate:
    """Asks for `Authorization: Bearer KEY` on every path but OPEN_PATHS."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            if not hmac.compare_digest(given, self._expected):
                error = ApiError(
                    "missing or wrong API key; send it as `Authorization: Bearer KEY`", 401, code="invalid_api_key"
                )
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyLimit:
    """Reads the whole body before the app runs; refuses one that is too large (413) or too slow (408)."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_seconds: float = BODY_TIMEOUT_SECONDS) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_seconds = timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except ApiError as error:
            # The rest of the body is still on its way: the connection cannot be used again.
            await error_response(error, {"Connection": "close"})(scope, receive, send)
            return
        if body is None:
            return
        message: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def receive_body() -> Message:
            nonlocal message
            if message is None:
                return await receive()
            first, message = message, None
            return first

        await self._app(scope, receive_body, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None when the client went away."""
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_bytes:
            raise self._too_large()
        body = bytearray()
        try:
            async with asyncio.timeout(self._timeout_seconds):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self._max_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as error:
            raise ApiError(f"the body did not arrive within {self._timeout_seconds:g} s", 408) from error

    def _too_large(self) -> ApiError:
        return ApiError(f"the body exceeds {self._max_bytes} bytes (max_body_bytes)", 413)
