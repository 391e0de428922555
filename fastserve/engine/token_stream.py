"""The reading end of a group of requests: new tokens as an async iterator.

A slow reader never holds up the engine or other readers: what arrives while it is away is merged, per request, into
one output. The group is what one HTTP request asked for (several prompts, or n completions), read as one stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

import msgspec

from fastserve.core.errors import FastServeError
from fastserve.core.request import TokenOutput


class TokenStream:
    """New tokens of the requests `request_ids`, until each has finished or was dropped.

    Iterating raises the FastServeError that ended the stream, if one did. Closing it, leaving its `async with`, or
    cancelling the task that waits in it aborts what still runs.
    """

    def __init__(self, request_ids: Iterable[str], abort: Callable[[list[str]], None]) -> None:
        self._open = dict.fromkeys(request_ids)
        self._abort = abort
        self._pending: dict[str, TokenOutput] = {}
        self._wake = asyncio.Event()
        self._error: FastServeError | None = None

    def push(self, output: TokenOutput) -> None:
        """Take one output; called by the client for every output of a request of this group."""
        if output.request_id not in self._open:
            return
        if output.finish_reason is not None:
            del self._open[output.request_id]
        earlier = self._pending.get(output.request_id)
        self._pending[output.request_id] = output if earlier is None else merge(earlier, output)
        self._wake.set()

    def fail(self, error: FastServeError) -> None:
        """End what still runs of the stream with `error`, after what has arrived so far was read."""
        if self._open:
            self._error = error
        self._stop()

    def drop(self, request_id: str) -> None:
        """Stop one request of the group; nothing more of it will be read."""
        self._pending.pop(request_id, None)
        if request_id in self._open:
            del self._open[request_id]
            self._abort([request_id])
            self._wake.set()

    def close(self) -> None:
        """Stop whatever still runs. May be called more than once."""
        self._pending.clear()
        self._stop()

    def _stop(self) -> None:
        running = list(self._open)
        self._open.clear()
        if running:
            self._abort(running)
        self._wake.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TokenOutput:
        while not self._pending:
            if self._error is not None:
                raise self._error
            if not self._open:
                raise StopAsyncIteration
            self._wake.clear()
            try:
                await self._wake.wait()
            except asyncio.CancelledError:
                self.close()
                raise
        return self._pending.pop(next(iter(self._pending)))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def merge(first: TokenOutput, second: TokenOutput) -> TokenOutput:
    """Two consecutive outputs of one request as one."""
    logprobs = [*(first.logprobs or ()), *(second.logprobs or ())]
    return msgspec.structs.replace(
        second,
        token_ids=first.token_ids + second.token_ids,
        logprobs=logprobs or None,
        prompt_logprobs=first.prompt_logprobs or second.prompt_logprobs,
        num_cached_tokens=first.num_cached_tokens or second.num_cached_tokens,
        scheduled_time=first.scheduled_time or second.scheduled_time,
    )
