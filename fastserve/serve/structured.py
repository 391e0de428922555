"""Whether a grammar can be compiled, found out before a request enters: off the event loop, a few at a time.

Compiling is bounded by fuel (see `core/grammars.py`); here it is bounded in number as well, and in what is remembered.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from fastserve.core.structured_outputs import StructuredOutputs
from fastserve.serve.errors import ApiError

_MAX_REMEMBERED = 256
_MAX_AT_ONCE = 1
_TIMEOUT_SECONDS = 10.0


class GrammarGate:
    """Refuses what cannot be compiled with 400, and too many at once with 503."""

    def __init__(self) -> None:
        self._known: OrderedDict[StructuredOutputs, None] = OrderedDict()
        self._turn = asyncio.Semaphore(_MAX_AT_ONCE)

    async def check(self, wanted: StructuredOutputs | None) -> None:
        """
        Raises:
            RequestError: the grammar is broken, beyond the limits, or has a keyword that is not supported.
            ApiError: others' grammars took too long.
        """
        if wanted is None or wanted in self._known:
            return
        try:
            async with asyncio.timeout(_TIMEOUT_SECONDS):
                await self._turn.acquire()
        except TimeoutError as error:
            raise ApiError("too many grammars wait to be compiled", 503, code="grammars_busy", retry_after=5) from error
        try:
            from fastserve.core.grammars import check

            await asyncio.to_thread(check, wanted)
        finally:
            self._turn.release()
        self._known[wanted] = None
        if len(self._known) > _MAX_REMEMBERED:
            self._known.popitem(last=False)
