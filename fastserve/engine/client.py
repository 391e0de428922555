"""EngineClient: starts the engine process, talks to it, and starts it again when it dies.

The asyncio side of the process boundary. It knows requests and token ids; it knows neither text nor HTTP, and never
imports torch. What happens when the engine dies: streams that have had a token end with EngineDeadError, requests
without one are kept and sent to the next engine process, and `state` says so all the while.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Sequence
from enum import StrEnum

import msgspec

from fastserve.core import errors
from fastserve.core.arrays import ArrayOutput, ArrayRequest, ModelSpec
from fastserve.core.config import EngineConfig
from fastserve.core.errors import EngineDeadError, FastServeError, QueueFullError, RequestError
from fastserve.core.request import Request
from fastserve.engine import messages
from fastserve.engine.array_client import ArrayClient
from fastserve.engine.link import EngineLink, default_command, describe_status
from fastserve.engine.token_stream import TokenStream

_log = logging.getLogger(__name__)
_CLOSE_SECONDS = 3.0
_LOOK_SECONDS = 0.05
_RETRY_AFTER, _MAX_RETRY_AFTER = 6.0, 60.0  # before the engine knows how long a request takes; at most
_GAUGES = {"num_running", "num_waiting", "kv_blocks_used", "kv_blocks_total", "request_seconds"}


class EngineState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STUCK = "stuck"
    DEAD = "dead"


@dataclasses.dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When a dead engine is started again.

    Attributes:
        delays: seconds before the first, second, ... restart in a row; the last one repeats.
        max_deaths: after this many deaths in a row the client gives up.
        healthy_after: seconds of readiness after which the count starts anew.
        max_deaths_per_request: a request that waited in this many dying engines is not tried again.
    """

    delays: tuple[float, ...] = (0.1, 1.0, 2.0, 5.0)
    max_deaths: int = 5
    healthy_after: float = 300.0
    max_deaths_per_request: int = 3


@dataclasses.dataclass(slots=True)
class _Live:
    """A request that has not finished."""

    request: Request
    stream: TokenStream
    is_sent: bool = False
    has_token: bool = False
    num_deaths: int = 0


class EngineClient:
    """One engine process, seen from an event loop. All methods belong to that loop's thread.

    Args:
        config: options of the engine; `max_waiting` bounds the queue here.
        command: program of the engine process; it gets the socket's number as its last argument.
        stall_timeout: seconds without a sign of life after which a ready engine is killed and restarted.
        models: the models that do not generate.
        generates: whether there is one that does, whose options are `config`.

    Attributes:
        state: see EngineState. Requests are taken (and wait) in every state but DEAD.
        stats: the engine's latest counters; they start at zero again with each process (`totals` go on).
        num_restarts: times that the process was started again.
        ready: limits and memory report of the engine, from the first time it was ready.
        arrays: the models that do not generate, and requests for them.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        command: Sequence[str] | None = None,
        stall_timeout: float = 60.0,
        restarts: RestartPolicy | None = None,
        models: Iterable[ModelSpec] = (),
        generates: bool = True,
    ) -> None:
        self.state = EngineState.STARTING
        self.stats = messages.EngineStats()
        self.num_restarts = 0
        self.ready: messages.Ready | None = None
        self.config = config
        self._command = list(command or default_command())
        self._stall_timeout = stall_timeout
        self._restarts = restarts or RestartPolicy()
        self.arrays = ArrayClient(models, self._send_frame, self._restarts.max_deaths_per_request)
        self.generates = generates
        self._live: dict[str, _Live] = {}
        self._asked: deque[tuple[messages.ChangeAdapter, asyncio.Future[None]]] = deque()
        self._past = messages.EngineStats()
        self._link: EngineLink | None = None
        self._failure: FastServeError | None = None
        self._ready_since: float | None = None
        self._is_closing = False
        self._started: asyncio.Future[None] | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._dead = asyncio.Event()

    async def start(self) -> None:
        """Start the engine process and wait until the model is loaded.

        Raises:
            FastServeError: it cannot start, with the engine's own message (ConfigError, CheckpointError, ...).
        """
        assert self._supervisor is None, "start() is called once"
        self._started = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")
        self._supervisor.add_done_callback(self._on_supervisor_end)
        await self._started

    def stream(self, *requests: Request) -> TokenStream:
        """Queue a group of requests and return the stream of their tokens. All are taken, or none.

        Raises:
            RequestError: one is larger than what can be sent, or there are more than can ever be here at once.
            QueueFullError: too many requests wait already.
            EngineDeadError: the engine died too often, or is being closed.
        """
        self._admit(len(requests))
        stream = TokenStream([request.request_id for request in requests], self.abort)
        try:
            for request in requests:
                assert request.request_id not in self._live, f"request id {request.request_id} is in use"
                live = self._live[request.request_id] = _Live(request, stream)
                live.is_sent = self._send_frame(messages.Add(request))
        except BaseException:
            stream.close()  # one that cannot be encoded must not leave the others behind
            raise
        return stream

    async def run(self, requests: list[ArrayRequest]) -> list[ArrayOutput]:
        """Answers of models that do not generate, in the order of the requests.

        Raises:
            RequestError: one cannot be served as asked, or there are more than can ever be here at once.
            QueueFullError: too many requests wait already.
            EngineDeadError: the engine died too often, or is being closed.
        """
        self._admit(len(requests))
        return await self.arrays.run(requests)

    def abort(self, request_ids: list[str]) -> None:
        """Stop these requests; ids that have finished are ignored."""
        known = [self._live.pop(request_id) for request_id in request_ids if request_id in self._live]
        sent = [live.request.request_id for live in known if live.is_sent]
        if sent:
            self._send_frame(messages.Abort(sent))

    def unload(self, name: str) -> None:
        """Forget one of the other models; requests that it has fail. Raises ConfigError when there is none."""
        self.arrays.unload(name)
        for live in [live for live in self._live.values() if live.request.model == name]:
            self.abort([live.request.request_id])
            live.stream.fail(RequestError(f"the model {name!r} was unloaded", "model"))

    @property
    def adapters(self) -> dict[str, str]:
        """The LoRA adapters that requests may have: name -> folder."""
        return self.config.adapters

    async def load_adapter(self, name: str, path: str) -> None:
        """Load a LoRA adapter, in engine processes that are started later, too.

        Raises RequestError when the engine refuses it, EngineDeadError when none is running now.
        """
        await self._ask(messages.ChangeAdapter(name, path))

    async def unload_adapter(self, name: str) -> None:
        """Refuse new requests for this adapter, wait for those that use it, and forget it. Raises as `load_adapter`."""
        if name not in self.adapters:
            raise RequestError(f"there is no adapter {name!r} here", "lora_name")
        self._keep_adapters({other: path for other, path in self.adapters.items() if other != name})
        while any(live.request.adapter == name for live in self._live.values()):
            await asyncio.sleep(_LOOK_SECONDS)
        await self._ask(messages.ChangeAdapter(name))

    async def _ask(self, message: messages.ChangeAdapter) -> None:
        if not self._send_frame(message):
            raise EngineDeadError("the engine is not running; try again when /ready says so")
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asked.append((message, answer))
        await answer

    def _keep_adapters(self, adapters: dict[str, str]) -> None:
        self.config = dataclasses.replace(self.config, lora=tuple(f"{name}={path}" for name, path in adapters.items()))

    def _on_done(self, done: messages.Done) -> None:
        message, answer = self._asked.popleft()
        if not done.error and message.path:
            self._keep_adapters({**self.adapters, message.name: message.path})
        if answer.done():
            return  # nobody waits any more
        if done.error:
            answer.set_exception(RequestError(done.error, done.param))
        else:
            answer.set_result(None)

    def end_all(self, error: FastServeError) -> None:
        """Stop every request; their readers get `error`."""
        ended = list(self._live.values())
        self.abort(list(self._live))
        for live in ended:
            live.stream.fail(error)
        self.arrays.fail_all(error)

    async def close(self) -> None:
        """End the engine process. Streams that still run end with EngineDeadError."""
        self._is_closing = True
        self.end_all(EngineDeadError("the server is shutting down"))
        if self._supervisor is not None:
            if self._send_frame(messages.Shutdown()):
                await asyncio.wait([self._supervisor], timeout=_CLOSE_SECONDS)
            # Loading a model, or waiting to be started again: nothing worth waiting for.
            self.kill()
            self._supervisor.cancel()
            await asyncio.wait([self._supervisor])
        self.state = EngineState.DEAD

    def kill(self) -> None:
        """End the engine process at once."""
        if self._link is not None:
            with contextlib.suppress(ProcessLookupError):
                self._link.process.kill()

    async def wait_dead(self) -> None:
        """Return when the engine has died so often that it is not started again."""
        await self._dead.wait()

    @property
    def process_id(self) -> int | None:
        """Process id of the engine, while there is one."""
        return self._link.process.pid if self._link is not None else None

    @property
    def totals(self) -> messages.EngineStats:
        """The counters summed over all engine processes so far, with the gauges of the present one."""
        return _add_counters(self._past, self.stats)

    @property
    def num_live(self) -> int:
        """Requests that have not finished, wherever they are."""
        return len(self._live) + self.arrays.num_live

    @property
    def num_waiting(self) -> int:
        """Requests that have not had a token or an answer."""
        return sum(not live.has_token for live in self._live.values()) + self.arrays.num_live

    @property
    def capacity(self) -> int:
        """Most requests that can be here at once: running and waiting."""
        return self.config.max_batch_sequences + self.config.max_waiting

    # Admission

    def check_count(self, count: int) -> None:
        """Raise RequestError when a group of `count` requests could never be taken."""
        if count > self.capacity:
            raise RequestError(
                f"this request asks for {count} sequences; the server takes at most {self.capacity} at once: "
                "send fewer, or raise max_waiting"
            )

    def _admit(self, count: int) -> None:
        if self.state is EngineState.DEAD or self._is_closing:
            raise EngineDeadError("the engine is not running; see the server's log")
        self.check_count(count)
        waiting = self.num_waiting
        # What fits into the running batch does not wait.
        free = max(0, self.config.max_batch_sequences - (self.num_live - waiting))
        if waiting + count > free + self.config.max_waiting:
            raise QueueFullError(
                f"{waiting} requests are waiting, which is as many as may (max_waiting={self.config.max_waiting}); "
                "try again later",
                # Until `count` of those who wait will have been taken, by what the engine expects of a request.
                min(_MAX_RETRY_AFTER, math.ceil(count * self.stats.request_seconds) or _RETRY_AFTER),
            )

    def _send_frame(self, message: messages.ToEngine) -> bool:
        """Send to a ready engine; False when there is none. Raises RequestError for what no engine takes."""
        frame = messages.encode_frame(message)
        if self.state is not EngineState.READY or self._link is None:
            return False
        self._link.send(frame)
        return True

    # The life of the process

    async def _supervise(self) -> None:
        assert self._started is not None
        deaths = 0
        while True:
            cause = await self._run_once()
            if self._is_closing:
                return
            if not self._started.done():
                self.state = EngineState.DEAD
                self._started.set_exception(cause)
                return
            if self._ready_since is not None:
                if time.monotonic() - self._ready_since >= self._restarts.healthy_after:
                    deaths = 0
                self._ready_since = None
            deaths += 1
            if deaths >= self._restarts.max_deaths:
                self._give_up(cause, deaths)
                return
            delay = self._restarts.delays[min(deaths, len(self._restarts.delays)) - 1]
            _log.error("%s; starting it again in %g s (death %d in a row)", cause, delay, deaths)
            await asyncio.sleep(delay)
            self.num_restarts += 1

    def _on_supervisor_end(self, task: asyncio.Task[None]) -> None:
        """A fault of our own in the supervisor must not leave readers waiting for ever."""
        if task.cancelled() or task.exception() is None:
            return
        _log.error("the engine's supervisor failed", exc_info=task.exception())
        self._give_up(EngineDeadError("the engine's supervisor failed"), 1)
        assert self._started is not None
        if not self._started.done():
            self._started.set_exception(EngineDeadError("the engine's supervisor failed; see the log"))

    def _give_up(self, cause: FastServeError, deaths: int) -> None:
        _log.error("%s; death %d in a row, giving up", cause, deaths)
        self.state = EngineState.DEAD
        self.end_all(EngineDeadError("the engine died too often and is not started again"))
        self._dead.set()

    async def _run_once(self) -> FastServeError:
        """One process from birth to death; returns why it ended."""
        self._failure = None
        try:
            link = self._link = await EngineLink.open(self._command)
        except OSError as error:
            return EngineDeadError(f"cannot start the engine process: {error}")
        watchdog = asyncio.create_task(self._watch(link), name="engine watchdog")
        reason = ""
        try:
            options, models = dataclasses.asdict(self.config), list(self.arrays.specs.values())
            link.send(messages.encode_frame(messages.Configure(options, models, self.generates)))
            while True:
                self._receive(await link.receive())
        except (EOFError, OSError):
            pass
        except (ValueError, msgspec.MsgspecError) as error:
            reason = f": it sent something unexpected ({error})"
        finally:
            watchdog.cancel()
            self._link = None
            self._on_death()
            status = await link.end(grace=_CLOSE_SECONDS if self._is_closing else 0.0)
        return self._failure or EngineDeadError(f"the engine process ended {describe_status(status)}{reason}")

    def _receive(self, message: messages.FromEngine) -> None:
        if isinstance(message, messages.Outputs):
            self.stats = message.stats
            for output in message.outputs:
                live = self._live.get(output.request_id)
                if live is None:
                    continue
                live.has_token = True
                if output.finish_reason is not None:
                    del self._live[output.request_id]
                live.stream.push(output)
            self.arrays.take(message)
        elif isinstance(message, messages.Loaded):
            self.arrays.take_loaded(message)
        elif isinstance(message, messages.Ready):
            self._on_ready(message)
        elif isinstance(message, messages.Done):
            self._on_done(message)
        else:
            self._failure = errors.rebuild(message.kind, message.message)

    def _on_ready(self, message: messages.Ready) -> None:
        assert self._started is not None
        if self.ready is not None:
            _log.info("the engine is ready again; %d requests go on", len(self._live))
        self.ready = message
        self.state = EngineState.READY
        self._ready_since = time.monotonic()
        for live in self._live.values():
            live.is_sent = self._send_frame(messages.Add(live.request))
        self.arrays.on_ready(message)
        if not self._started.done():
            self._started.set_result(None)

    def _on_death(self) -> None:
        """End the streams that cannot go on; keep the requests that have had nothing yet."""
        if self._started is not None and self._started.done():
            self.state = EngineState.RESTARTING
        self._past = _add_counters(self._past, self.stats)
        self.stats = messages.EngineStats()
        while self._asked:
            _, answer = self._asked.popleft()
            if not answer.done():
                answer.set_exception(EngineDeadError("the engine died meanwhile; try again when /ready says so"))
        self.arrays.on_death()
        for request_id, live in list(self._live.items()):
            if request_id not in self._live:
                continue  # stopped with another one of its group
            live.num_deaths += live.is_sent
            live.is_sent = False
            if live.has_token:
                error = EngineDeadError("the engine died while it worked on this request; send it again")
            elif live.num_deaths >= self._restarts.max_deaths_per_request:
                error = EngineDeadError(f"the engine died {live.num_deaths} times while this request waited")
            else:
                continue
            del self._live[request_id]
            live.stream.fail(error)

    async def _watch(self, link: EngineLink) -> None:
        """Notice a process that is gone though its socket is open, and one that no longer gives a sign of life."""
        suspicions = 0
        while True:
            await asyncio.sleep(min(0.5, self._stall_timeout / 4))
            is_gone = link.process.poll() is not None
            silence = time.monotonic() - link.last_frame
            is_silent = self.state is EngineState.READY and silence > self._stall_timeout
            # Twice in a row, so that frames which wait in our own loop are read first.
            suspicions = suspicions + 1 if is_gone or is_silent else 0
            if suspicions < 2:
                continue
            if is_silent:
                self.state = EngineState.STUCK
                _log.error("no sign of life from the engine for %.0f s: killing it", silence)
                link.process.kill()
            link.cut()
            return


def _add_counters(past: messages.EngineStats, present: messages.EngineStats) -> messages.EngineStats:
    counters = set(messages.EngineStats.__struct_fields__) - _GAUGES
    return msgspec.structs.replace(present, **{name: getattr(past, name) + getattr(present, name) for name in counters})
