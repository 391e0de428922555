"""The way of a request that is answered once, from an endpoint to the engine and back: admitted, timed, watched."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fastapi import Request

from fastserve.core.arrays import ArrayOutput, ArrayRequest
from fastserve.engine.client import EngineClient
from fastserve.serve.admission import Admission
from fastserve.serve.array_metrics import ArrayMetrics
from fastserve.serve.errors import ApiError
from fastserve.serve.limits import header_timeout
from fastserve.serve.stream import ClientGoneError, while_connected
from fastserve.serve.tenants import tenant_of

_CLIENT_CLOSED_REQUEST = 499


class ArrayRequests:
    """What endpoints of encoders and of the user's own networks share.

    Args:
        client: the engine.
        admission: the budgets, shared with generation.
        metrics: told how each call ended.
        check_open: raises ApiError while nothing can be taken.
        max_seconds: longest time for any request; 0 is no limit.
    """

    def __init__(
        self,
        client: EngineClient,
        admission: Admission,
        metrics: ArrayMetrics,
        check_open: Callable[[], None],
        max_seconds: float,
    ) -> None:
        self.client = client
        self.check_open = check_open
        self._admission = admission
        self._metrics = metrics
        self._max_seconds = max_seconds

    async def run(self, request: Request, asked: list[ArrayRequest], cost: int) -> list[ArrayOutput]:
        """The engine's answers, while the one who asked is still there.

        Args:
            cost: tokens of all of them.

        Raises:
            ApiError: time is over (the server's, or the client's own), or the client went away.
            FastServeError: see `EngineClient.run` and `Admission.enter`.
        """
        limit = min(filter(None, (header_timeout(request), self._max_seconds)), default=0.0)
        capacity = self.client.capacity
        self.client.check_count(len(asked))
        leave = self._admission.enter(tenant_of(request), len(asked), cost, capacity, full_batch=max(1, cost))
        try:
            with self._metrics.call(asked[0].model, len(asked)):
                async with asyncio.timeout(limit or None):
                    return await while_connected(request.receive, self.client.run(asked))
        except TimeoutError as error:
            message = f"the answer was not ready within {limit:g} s"
            raise ApiError(message, 504, code="deadline_exceeded") from error
        except ClientGoneError as error:
            raise ApiError("the client went away", _CLIENT_CLOSED_REQUEST) from error
        finally:
            leave()
