"""Requests that are answered once, as `EngineClient` sees them: sent, kept while the engine restarts, answered.

Such a request changes nothing and is small, so one that was lost with an engine process is simply sent to the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fastserve.core import errors
from fastserve.core.arrays import ArrayBatch, ArrayOutput, ArrayRequest, ModelInfo, ModelSpec
from fastserve.core.errors import ConfigError, EngineDeadError, FastServeError, RequestError
from fastserve.engine.messages import Abort, Add, Load, Loaded, Outputs, Ready, ToEngine, Unload


@dataclass(slots=True)
class _Live:
    """A request without an answer."""

    request: ArrayRequest
    answer: asyncio.Future[ArrayOutput]
    is_sent: bool = False
    num_deaths: int = 0


class ArrayClient:
    """The models of an engine process that do not generate.

    Args:
        specs: those that are loaded at every start of the process.
        send: hands a message to a ready engine; False when there is none. Raises RequestError for what no engine takes.
        max_deaths: a request that was in this many dying engines is not tried again.

    Attributes:
        specs: name -> model, those loaded at run time included.
        models: what the engine says of those that are loaded.
        on_batch: told of every batch that was computed.
    """

    def __init__(self, specs: Iterable[ModelSpec], send: Callable[[ToEngine], bool], max_deaths: int) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self.models: dict[str, ModelInfo] = {}
        self.on_batch: Callable[[ArrayBatch], None] = lambda batch: None
        self._send = send
        self._max_deaths = max_deaths
        self._live: dict[str, _Live] = {}
        self._loading: dict[str, asyncio.Future[ModelInfo]] = {}

    @property
    def num_live(self) -> int:
        """Requests without an answer."""
        return len(self._live)

    def num_live_of(self, model: str) -> int:
        """Requests for `model` without an answer."""
        return sum(live.request.model == model for live in self._live.values())

    async def run(self, requests: list[ArrayRequest]) -> list[ArrayOutput]:
        """Answers in the order of the requests; all are given up when this is cancelled or one fails.

        Raises:
            RequestError: one cannot be served as asked.
            EngineDeadError: the engine died too often meanwhile.
        """
        loop = asyncio.get_running_loop()
        lives = [_Live(request, loop.create_future()) for request in requests]
        try:
            for live in lives:
                assert live.request.request_id not in self._live, "request ids are unique"
                self._live[live.request.request_id] = live
                live.is_sent = self._send(Add(live.request))
            return list(await asyncio.gather(*(live.answer for live in lives)))
        finally:
            left = [live.request.request_id for live in lives if not live.answer.done() or live.answer.cancelled()]
            for live in lives:
                self._live.pop(live.request.request_id, None)
                if live.answer.done() and not live.answer.cancelled():
                    live.answer.exception()  # seen: gather raises the first of several only
            if left:
                self._send(Abort(left))

    async def load(self, spec: ModelSpec) -> ModelInfo:
        """Load a further model.

        Raises:
            FastServeError: it cannot be loaded, does not fit, or its name is taken.
        """
        if spec.name in self.specs or spec.name in self._loading:
            raise ConfigError(f"there is a model {spec.name!r} already; choose another name")
        future = self._loading[spec.name] = asyncio.get_running_loop().create_future()
        try:
            if not self._send(Load(spec)):
                raise EngineDeadError("the engine is not running; try again when /ready says so")
            info = await future
        finally:
            self._loading.pop(spec.name, None)
        self.specs[spec.name] = spec
        return info

    def unload(self, name: str) -> None:
        """Forget a model; requests that wait for it fail.

        Raises:
            ConfigError: there is none of this name.
        """
        if self.specs.pop(name, None) is None:
            raise ConfigError(f"there is no model {name!r} that can be unloaded")
        self.models.pop(name, None)
        self._send(Unload(name))
        for live in list(self._live.values()):
            if live.request.model == name:
                _fail(live, RequestError(f"the model {name!r} was unloaded", "model"))

    def on_ready(self, message: Ready) -> None:
        """An engine process is ready: it has the models of `specs`, and no request yet."""
        self.models = {info.name: info for info in message.models}
        for live in self._live.values():
            live.is_sent = self._send(Add(live.request))

    def on_death(self) -> None:
        """The engine process is gone, and the models that were being loaded with it."""
        for future in self._loading.values():
            if not future.done():
                future.set_exception(EngineDeadError("the engine died while it loaded the model"))
        for live in list(self._live.values()):
            live.num_deaths += live.is_sent
            live.is_sent = False
            if live.num_deaths >= self._max_deaths:
                _fail(live, EngineDeadError(f"the engine died {live.num_deaths} times while this request waited"))

    def take(self, message: Outputs) -> None:
        """Answers that the engine sent, and what their step was."""
        if message.batch is not None:
            self.on_batch(message.batch)
        for output in message.answers:
            live = self._live.pop(output.request_id, None)
            if live is None or live.answer.done():
                continue
            if output.error is None:
                live.answer.set_result(output)
            else:
                _fail(live, RequestError(output.error) if output.is_refused else FastServeError(output.error))

    def fail_all(self, error: FastServeError) -> None:
        """Stop every request; their senders get `error`."""
        for live in list(self._live.values()):
            _fail(live, error)

    def take_loaded(self, message: Loaded) -> None:
        """A further model is there, or why not."""
        future = self._loading.get(message.name)
        if message.info is not None:
            self.models[message.name] = message.info
        if future is None or future.done():
            return
        if message.info is not None:
            future.set_result(message.info)
        else:
            future.set_exception(errors.rebuild(message.kind, message.error))


def _fail(live: _Live, error: FastServeError) -> None:
    if not live.answer.done():
        live.answer.set_exception(error)
