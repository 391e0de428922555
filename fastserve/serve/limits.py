"""The door: who may come in (API key) and how much they may bring (sizes of URL, headers and body, time).

Plain ASGI wrappers around the app. Everything is refused by default: with a key set, every path but /health needs it,
whatever routes are added later. `connection.py` watches what comes before a request is whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastserve.serve.errors import ApiError, error_response
from fastserve.serve.openai import MAX_TIMEOUT_SECONDS
from fastserve.serve.tenants import KeyRing

OPEN_PATHS = frozenset({"/health"})
BODY_TIMEOUT_SECONDS = 60.0
MAX_URL_BYTES = 8 * 1024
MAX_HEADERS = 128
MAX_HEADER_BYTES = 32 * 1024
TIMEOUT_HEADER = "X-Request-Timeout"


class ApiKeyGate:
    """Asks for `Authorization: Bearer KEY` on every path but OPEN_PATHS; the tenant is in `request.state.tenant`."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._keys and scope["path"] not in OPEN_PATHS:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            tenant = self._keys.tenant(given)
            if tenant is None:
                error = ApiError(
                    "missing or wrong API key; send it as `Authorization: Bearer KEY`", 401, code="invalid_api_key"
                )
                await error_response(error)(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant
        await self._app(scope, receive, send)


class HeadLimit:
    """Refuses URLs (414) and headers (431) that are too long."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = _check_head(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await error_response(error, {"Connection": "close"})(scope, receive, send)


def _check_head(scope: Scope) -> ApiError | None:
    length = len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"")
    if length > MAX_URL_BYTES:
        return ApiError(f"the URL has {length} bytes; at most {MAX_URL_BYTES} are read", 414)
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers)
    if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
        return ApiError(
            f"{len(headers)} headers of {size} bytes; at most {MAX_HEADERS} of {MAX_HEADER_BYTES} are read", 431
        )
    return None


class BodyLimit:
    """Reads the whole body before the app runs; refuses one that is too large (413) or too slow (408).

    Args:
        max_bytes: largest body.
        more_bytes: path -> largest body, for the paths that take another size.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        timeout_seconds: float = BODY_TIMEOUT_SECONDS,
        more_bytes: Mapping[str, int] | None = None,
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._more_bytes = dict(more_bytes or {})
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
        limit = self._more_bytes.get(scope["path"], self._max_bytes)
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdecimal() and (len(length) > 20 or int(length) > limit):
            raise _too_large(limit)
        body = bytearray()
        try:
            async with asyncio.timeout(self._timeout_seconds):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return None
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise _too_large(limit)
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as error:
            raise ApiError(f"the body did not arrive within {self._timeout_seconds:g} s", 408) from error


def header_timeout(request: Request) -> float | None:
    """Seconds that a client gives a request by a header, if it says any. Raises ApiError for what is no such time."""
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_TIMEOUT_SECONDS:
        raise ApiError(f"{TIMEOUT_HEADER} must be seconds, above 0 and at most {MAX_TIMEOUT_SECONDS}")
    return seconds


def _too_large(limit: int) -> ApiError:
    return ApiError(f"the body exceeds {limit} bytes (max_body_bytes)", 413)
