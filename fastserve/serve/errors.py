"""Errors as HTTP replies, all in OpenAI's form: {"error": {"message", "type", "param", "code"}}.

Every FastServeError knows its status; this module only writes it down, and does the same for what the web framework
raises by itself (unknown paths, wrong methods, bodies that do not fit their schema).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from fastserve.core.errors import EngineDeadError, FastServeError, QueueFullError, RequestError

_log = logging.getLogger(__name__)
_ENGINE_RETRY_SECONDS = 5
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(FastServeError):
    """An error with everything that OpenAI's form has room for. `retry_after` is in seconds."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.http_status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after


class ErrorBody(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(msgspec.Struct):
    error: ErrorBody


def as_api_error(error: Exception) -> ApiError:
    """Any exception as an ApiError; one that is not ours is logged and told to nobody."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(str(error), 429, code="queue_full", retry_after=error.retry_after)
    if isinstance(error, EngineDeadError):
        return ApiError(str(error), 503, code="engine_unavailable", retry_after=_ENGINE_RETRY_SECONDS)
    if isinstance(error, RequestError):
        return ApiError(str(error), 400, param=error.param)
    if isinstance(error, FastServeError):
        return ApiError(str(error), error.http_status)
    _log.error("internal error", exc_info=error)
    return ApiError("internal error; the server's log has the details", 500)


def error_json(error: ApiError) -> bytes:
    """The body of the reply, also used as the last event of a stream that fails."""
    status = error.http_status
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    param = None if error.param is None else _encodable(error.param)
    return msgspec.json.encode(ErrorReply(ErrorBody(_encodable(str(error)), kind, param, error.code)))


def error_response(error: Exception, headers: Mapping[str, str] | None = None) -> Response:
    """The whole reply for `error`."""
    api_error = as_api_error(error)
    all_headers = dict(headers or {})
    if api_error.retry_after is not None:
        all_headers["Retry-After"] = str(math.ceil(api_error.retry_after))
    if api_error.http_status == 401:
        all_headers["WWW-Authenticate"] = "Bearer"
    return Response(
        error_json(api_error), status_code=api_error.http_status, headers=all_headers, media_type="application/json"
    )


def install(app: FastAPI) -> None:
    """Answer every kind of error in the one form."""

    async def on_known(_: Request, error: Exception) -> Response:
        return error_response(error)

    async def on_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(ApiError(_describe_http(error), error.status_code), error.headers)

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        problems, kind = error.errors(), request.headers.get("content-type", "")
        if problems[0]["loc"][0] == "body" and "json" not in kind:
            return error_response(ApiError(f"send JSON with Content-Type: application/json, not {kind or 'none'}"))
        return error_response(_from_validation(problems))

    app.add_exception_handler(FastServeError, on_known)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(Exception, on_known)


def _encodable(text: str) -> str:
    """Quoted input may hold halves of surrogate pairs, which no encoding takes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _describe_http(error: HTTPException) -> str:
    if error.status_code == 404:
        return "no such path; see /docs for what there is"
    if error.status_code == 405:
        return "this path does not take that method; see /docs"
    return str(error.detail)


def _from_validation(problems: Sequence[Any]) -> ApiError:
    """The first problem of a body or a query, named by its path such as messages.0.content."""
    problem = problems[0]
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, RequestError):
        return as_api_error(cause)
    if problem["type"] == "json_invalid":
        return ApiError(f"the body is not valid JSON: {problem.get('ctx', {}).get('error', problem['msg'])}")
    path = ".".join(str(part) for part in problem["loc"][1:])
    message = str(problem["msg"])
    return ApiError(f"{path}: {message}" if path else message, param=path or None)
