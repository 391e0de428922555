"""The engine process: reads requests from an inherited socket, runs the engine, writes tokens back.

Started by `EngineClient` as `python -m fastserve.engine.process FD`. It owns the model and imports torch; the other
end owns HTTP and text. It opens no port and reads no pickle: frames are the typed structs of `engine/messages.py`.
The parent decides about its life: SIGINT and SIGTERM are ignored here (a terminal and a service manager send them to
the whole group), and the process ends when the socket closes, when it is told to, or when the parent dies.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator

from fastserve.core.arrays import ArrayBatch, ArrayOutput, ArrayRequest
from fastserve.core.config import EngineConfig
from fastserve.core.errors import FastServeError, RequestError
from fastserve.core.logs import configure_logging
from fastserve.core.request import FINISH_ERROR, Request, TokenOutput
from fastserve.engine import messages
from fastserve.engine.runtimes import RunnableEngine, Runtimes

HEARTBEAT_SECONDS = 0.5
_RECEIVE_BYTES = 1 << 18
_PR_SET_PDEATHSIG = 1
Output = TokenOutput | ArrayOutput
_log = logging.getLogger(__name__)


class Connection:
    """Whole frames over a blocking stream socket."""

    def __init__(self, stream: socket.socket) -> None:
        self._socket = stream
        self._buffer = bytearray()
        self._poll = select.poll()
        self._poll.register(stream, select.POLLIN)

    def receive(self, timeout: float) -> list[messages.ToEngine]:
        """Every frame that has arrived; waits up to `timeout` seconds when there is none.

        Raises:
            EOFError: the other end is gone.
            ValueError: what arrived is no frame of ours.
        """
        wait_ms = int(timeout * 1000)
        while self._poll.poll(wait_ms):
            data = self._socket.recv(_RECEIVE_BYTES)
            if not data:
                raise EOFError("the server process is gone")
            self._buffer += data
            wait_ms = 0
        return list(self._frames())

    def _frames(self) -> Iterator[messages.ToEngine]:
        start = 0
        while len(self._buffer) - start >= messages.HEADER.size:
            length = messages.checked_length(*messages.HEADER.unpack_from(self._buffer, start))
            end = start + messages.HEADER.size + length
            if len(self._buffer) < end:
                break
            yield messages.to_engine_decoder.decode(bytes(self._buffer[start + messages.HEADER.size : end]))
            start = end
        del self._buffer[:start]

    def send(self, message: messages.FromEngine) -> None:
        """Write one frame; waits while the other end is slow.

        Raises:
            OSError: the other end is gone.
            RequestError: see `encode_frame`.
        """
        self._socket.sendall(messages.encode_frame(message))


def build_engine(config: EngineConfig) -> RunnableEngine:
    """Load the model. Imported here because this is where torch comes in."""
    from fastserve.engine.engine import Engine

    return Engine(config)


def run(connection: Connection, engine: Runtimes) -> None:
    """Serve until told to stop or the other end closes: receive, step, send. A heartbeat goes out while idle."""
    last_sent = 0.0
    while True:
        outputs: list[Output] = []
        for message in connection.receive(0.0 if engine.has_work() else HEARTBEAT_SECONDS):
            if isinstance(message, messages.Shutdown):
                return
            outputs += _apply(connection, engine, message)
        stepped = engine.has_work()
        if stepped:
            outputs += engine.step()
        for news in engine.tend():
            connection.send(news)
        now = time.monotonic()
        if outputs or stepped or now - last_sent >= HEARTBEAT_SECONDS:
            _send(connection, engine, outputs, engine.take_batch())
            last_sent = now


def _send(connection: Connection, engine: Runtimes, outputs: list[Output], batch: ArrayBatch | None) -> None:
    """In several frames what is too large for one; an output that is too large by itself becomes an error."""
    tokens = [output for output in outputs if isinstance(output, TokenOutput)]
    answers = [output for output in outputs if isinstance(output, ArrayOutput)]
    try:
        connection.send(messages.Outputs(tokens, engine.stats(), answers, batch))
    except RequestError as error:
        half = len(outputs) // 2
        if half:
            _send(connection, engine, outputs[:half], None)
        else:
            engine.abort([outputs[0].request_id])
            outputs = [_refused(outputs[0], error)]
        _send(connection, engine, outputs[half:], batch)


def _apply(connection: Connection, engine: Runtimes, message: messages.ToEngine) -> list[Output]:
    """One request that cannot be served must not end the others."""
    if isinstance(message, messages.Abort):
        engine.abort(message.request_ids)
    elif isinstance(message, messages.Add):
        try:
            engine.add(message.request)
        except Exception as error:
            return [_refused(message.request, error)]
    elif isinstance(message, messages.Load | messages.Unload):
        name = message.name if isinstance(message, messages.Unload) else message.model.name
        try:
            engine.unload(name) if isinstance(message, messages.Unload) else engine.load(message.model)
        except FastServeError as error:
            connection.send(messages.Loaded(name, error=str(error), kind=type(error).__name__))
    elif isinstance(message, messages.ChangeAdapter):
        try:
            engine.change_adapter(message.name, message.path)
            connection.send(messages.Done())
        except FastServeError as error:
            connection.send(messages.Done(str(error), getattr(error, "param", None)))
    else:
        raise ValueError(f"unexpected {type(message).__name__} after the start")
    return []


def _refused(asked: Request | ArrayRequest | Output, error: Exception) -> Output:
    """The answer to a request, or in place of an output, that cannot be."""
    if not isinstance(error, FastServeError):
        _log.error("request %s failed", asked.request_id, exc_info=error)
    text, is_refused = str(error) or type(error).__name__, isinstance(error, RequestError)
    if isinstance(asked, Request | TokenOutput):
        return TokenOutput(asked.request_id, [], FINISH_ERROR, error=text, is_refused=is_refused)
    return ArrayOutput(asked.request_id, error=text, is_refused=is_refused)


def settle_garbage() -> None:
    """What lives now lives for ever: never look at it again, and look at the rest seldom. A full collection over ten
    thousand waiting requests takes longer than a step; the serving path makes no cycles worth hunting."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 1000)


def main(descriptor: int, build: Callable[[EngineConfig], RunnableEngine] = build_engine) -> int:
    """Run one engine on the socket `descriptor`; returns the exit status."""
    _follow_parent()
    configure_logging("engine")
    # Children of ours (compilers, say) must not hold the socket open after we are gone.
    os.set_inheritable(descriptor, False)
    connection = Connection(socket.socket(fileno=descriptor))
    try:
        start = _receive_start(connection)
        try:
            config = EngineConfig.from_options(start.options)
            engine = Runtimes((lambda: build(config)) if start.generates else None, start.models)
            settle_garbage()
            connection.send(messages.Ready(engine.max_model_len, engine.vocab_size, engine.report, engine.models))
            run(connection, engine)
        except (EOFError, ConnectionError):
            raise
        except FastServeError as error:
            _log.debug("failed", exc_info=True)
            connection.send(messages.Failed(str(error), type(error).__name__))
            return error.exit_code
        except Exception as error:
            _log.exception("the engine failed")
            connection.send(messages.Failed(_describe(error), type(error).__name__))
            return 1
    except (EOFError, ConnectionError):
        return 0  # the parent is gone: nobody is left to tell
    return 0


def _receive_start(connection: Connection) -> messages.Configure:
    received: list[messages.ToEngine] = []
    while not received:
        received = connection.receive(HEARTBEAT_SECONDS)
    first = received[0]
    if not isinstance(first, messages.Configure) or len(received) > 1:
        raise ValueError(f"the first frame must be Configure alone, not {type(first).__name__}")
    return first


def _describe(error: BaseException) -> str:
    """The error and, when it was caused by another one, the first cause."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    text = f"{type(error).__name__}: {error}"
    return text if root is error else f"{text} (caused by {type(root).__name__}: {root})"


def _follow_parent() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
