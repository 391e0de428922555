"""Errors that a user can cause or must act on.

Every class carries a message that says what to do next. `http_status` and `exit_code` let the HTTP server and the
command line report the same error without a table of their own. Programming errors are plain assertions instead.
"""

from __future__ import annotations


class FastServeError(Exception):
    """Base of all errors raised on purpose; the message is meant for the user."""

    http_status = 500
    exit_code = 1


class ConfigError(FastServeError, ValueError):
    """An option, flag or recipe value that cannot work; the message names it and says what would."""

    http_status = 400
    exit_code = 2


class CheckpointError(FastServeError):
    """A model folder that is missing, damaged, of an unknown architecture, or has tensors of wrong names or shapes."""

    http_status = 500
    exit_code = 3


class MemoryPlanError(FastServeError):
    """The model and its KV cache do not fit; the message names the setting to change."""

    http_status = 500
    exit_code = 3


class RequestError(FastServeError, ValueError):
    """A request that cannot be served as asked (HTTP 400). `param` names the offending field when there is one."""

    http_status = 400
    exit_code = 2

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class QueueFullError(FastServeError):
    """The waiting queue is full (HTTP 429). `retry_after` is the advised wait in seconds."""

    http_status = 429

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineDeadError(FastServeError):
    """The engine process died or is being restarted (HTTP 503)."""

    http_status = 503


def rebuild(kind: str, message: str) -> FastServeError:
    """An error that another process told of by its class's name; one that is not ours is an EngineDeadError."""
    known = globals().get(kind)
    if isinstance(known, type) and issubclass(known, FastServeError):
        return known(message)
    return EngineDeadError(f"the engine failed: {message}")
