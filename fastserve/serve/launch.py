"""Start, run and end the server: one listening socket, one engine process, a clean way out.

The port is taken first, so that a port in use is told in a moment and not after the model was loaded; the engine
process starts next and loads the model while this process imports the web framework. The first SIGTERM or SIGINT
drains: /ready says no, new requests get 503, running ones may finish until drain_timeout. A second one exits at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import shlex
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from fastserve.checkpoint.sampling_defaults import sampling_defaults
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.core.config import ServeConfig
from fastserve.core.errors import EngineDeadError, FastServeError
from fastserve.engine.client import EngineClient
from fastserve.serve.models import ServedModels
from fastserve.serve.tenants import KeyRing

if TYPE_CHECKING:
    import uvicorn

    from fastserve.serve.app import Application

_log = logging.getLogger(__name__)
_BACKLOG = 2048
# After the last token: time for replies to reach slow clients.
_FLUSH_SECONDS = 5
_POLL_SECONDS = 0.05
_OWN_DESCRIPTORS = 128
# Longer than clients keep idle connections, so that they close first and none is reused while it is being closed.
_KEEP_ALIVE_SECONDS = 75
# What an encoder may be asked first, by its task.
_FIRST_CALLS = {
    "feature-extraction": ("embeddings", '"input": "A fox sleeps in the wood"'),
    "fill-mask": ("fill-mask", '"input": "The fox sleeps in the [MASK]."'),
    "text-classification": ("/classify", '"input": "A fox sleeps in the wood"'),
    "token-classification": ("token-classification", '"input": "Ada Lovelace lived in London"'),
    "question-answering": (
        "question-answering",
        '"question": "Who sleeps?", "context": "A fox sleeps in the wood."',
    ),
    "text2text-generation": ("completions", '"prompt": "A fox sleeps in the wood."'),
}


class AddressError(FastServeError):
    """The address cannot be listened on."""

    exit_code = 3


def serve(config: ServeConfig, announce: Callable[[str], None], *, engine_command: Sequence[str] | None = None) -> int:
    """Serve until a signal ends it; returns the exit status.

    Args:
        announce: shows the banner once requests can be answered.
        engine_command: program of the engine process; for tests.

    Raises:
        AddressError: the port is in use, or the host is not ours.
        FastServeError: the model cannot be loaded, or the engine died too often.
    """
    keys = KeyRing.load(config)
    _allow_connections()
    with bind(config.host, config.port) as listener:
        server = _Server(config, ServedModels.of(config), keys, listener, announce)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(server.run(engine_command))


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        AddressError: with the reason, and what to do about it.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise AddressError(f"cannot listen on host {host!r}: {error.strerror}; choose another with --host") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise AddressError(
            f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0)}; "
            "choose another port with --port (0 takes a free one)"
        ) from error
    return listener


class _Server:
    """One run of the server."""

    def __init__(
        self,
        config: ServeConfig,
        models: ServedModels,
        keys: KeyRing,
        listener: socket.socket,
        announce: Callable[[str], None],
    ) -> None:
        self._config = config
        self._models = models
        self._keys = keys
        self._listener = listener
        self._announce = announce
        self._started = time.monotonic()
        self._stop = asyncio.Event()

    async def run(self, engine_command: Sequence[str] | None) -> int:
        models = self._models
        client = EngineClient(
            models.engine,
            command=engine_command,
            stall_timeout=self._config.stall_timeout,
            models=models.others,
            generates=models.generates,
        )
        with self._signals(client):
            starting = asyncio.create_task(client.start(), name="engine start")
            await asyncio.sleep(0)  # lets the process start before our own imports
            web, app = self._make_web_server(client)
            serving = asyncio.create_task(web.serve(sockets=[self._listener]), name="web server")
            try:
                if await self._unless_stopped(starting):
                    app.batches.start()
                    self._announce(self._banner(client, app.api.has_chat_template))
                    await self._watch(client, app, serving)
            finally:
                starting.cancel()
                await app.batches.close()
                web.should_exit = True
                await asyncio.wait([serving, starting])
                await client.close()
        return 0

    def _make_web_server(self, client: EngineClient) -> tuple[uvicorn.Server, Application]:
        import uvicorn

        from fastserve.serve.app import AppOptions, create_app
        from fastserve.serve.connection import BoundedConnection

        class Connection(BoundedConnection):
            """Leaves descriptors for the rest of the process."""

            max_connections = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _OWN_DESCRIPTORS)

        class WebServer(uvicorn.Server):
            """Leaves signals to us."""

            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield

        folder = self._models.folder
        app = create_app(
            client,
            Tokenizer.load(folder, self._config.chat_template) if folder is not None else Tokenizer.without_model(),
            model_name=self._models.name,
            aliases=frozenset({self._config.model} - {""}) if self._models.generates else frozenset(),
            defaults=sampling_defaults(folder) if folder is not None and self._models.generates else {},
            options=AppOptions(
                keys=self._keys,
                **{item.name: getattr(self._config, item.name) for item in fields(AppOptions) if item.name != "keys"},
            ),
        )
        settings = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=_FLUSH_SECONDS,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        )
        return WebServer(settings), app

    async def _watch(self, client: EngineClient, app: Application, serving: asyncio.Task[None]) -> None:
        """Until a signal, then drain. Raises when the engine is dead for good."""
        dead = asyncio.create_task(client.wait_dead())
        try:
            stopped = await self._unless_stopped(dead, serving)
        finally:
            dead.cancel()
        if stopped:
            raise EngineDeadError("the engine died too often; see the log above for the reason")
        app.api.generator.is_draining = True
        await app.batches.close()
        running = client.num_live
        _log.info("draining: %d requests are running; signal again to exit at once", running)
        deadline = time.monotonic() + self._config.drain_timeout
        while client.num_live and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        if client.num_live:
            _log.warning("%d requests did not finish within %g s", client.num_live, self._config.drain_timeout)
            client.end_all(EngineDeadError("the server is shutting down"))

    async def _unless_stopped(self, *tasks: asyncio.Task[None]) -> bool:
        """Wait for one of `tasks` (True, its error is raised) or for a signal (False)."""
        stopping = asyncio.create_task(self._stop.wait())
        done, _ = await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        for task in tasks:
            if task in done:
                task.result()
                return True
        return False

    @contextlib.contextmanager
    def _signals(self, client: EngineClient) -> Iterator[None]:
        loop = asyncio.get_running_loop()

        def on_signal(number: int) -> None:
            if self._stop.is_set():
                client.kill()
                os._exit(128 + number)
            self._stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal, number)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _banner(self, client: EngineClient, has_chat: bool) -> str:
        assert client.ready is not None
        host, port = self._listener.getsockname()[:2]
        url = f"http://{_reachable(host)}:{port}"
        lines = [
            client.ready.report,
            f"serving {', '.join(self._names())} at {url} after {time.monotonic() - self._started:.1f} s",
        ]
        if not _is_loopback(host) and not self._keys:
            lines.append("warning: other machines can reach this server and no API key is set (FASTSERVE_API_KEY)")
        if self._keys.num_tenants > 1 and self._config.scheduler == "fcfs":
            lines.append("note: requests of all keys are served in order of arrival; --scheduler fair shares equally")
        return "\n".join([*lines, "try:", f"  {self._curl(url, has_chat)}"])

    def _names(self) -> list[str]:
        return [*([self._models.name] if self._models.generates else []), *(spec.name for spec in self._models.others)]

    def _curl(self, url: str, has_chat: bool) -> str:
        if self._models.folder is None:
            return f"curl -N {url}/v2/models/{self._models.name}"
        if not self._models.generates:
            path, ask = _FIRST_CALLS[self._models.folder.task]
        elif has_chat:
            path, ask = "chat/completions", '"messages": [{"role": "user", "content": "Tell me a story about a fox"}]'
        else:
            path, ask = "completions", '"prompt": "Once upon a time", "max_tokens": 64'
        ask = f'"stream": true, {ask}' if self._models.generates else ask
        body = f'{{"model": "{self._models.name}", {ask}}}'
        key = ' -H "Authorization: Bearer $FASTSERVE_API_KEY"' if self._keys else ""
        path = path if path.startswith("/") else f"/v1/{path}"
        return f"curl -N {url}{path} -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}"


def _allow_connections() -> None:
    """As many descriptors as this process may have: each connection takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        _log.info("uvloop is not installed; using asyncio's own event loop")
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def _reachable(host: str) -> str:
    """The host for a URL on this machine."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1" if host == "0.0.0.0" else "[::1]"
    return f"[{host}]" if ":" in host else host


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host == "::1"
