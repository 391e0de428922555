"""One engine process and the socket to it: start, send and receive frames, end. The client decides, this obeys."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from fastserve.engine.messages import HEADER, FromEngine, checked_length, from_engine_decoder


class EngineLink:
    """One engine process and the socket to it."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.process = process
        self.last_frame = time.monotonic()
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, command: Sequence[str]) -> EngineLink:
        """Start `command` with the number of its end of a socket pair as the last argument."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # whatever a library prints there must not mix with the output of the command
            )
            kept = ours.dup()  # `ours` is closed whether the process was started or not
        reader, writer = await asyncio.open_unix_connection(sock=kept)
        return cls(process, reader, writer)

    def send(self, frame: bytes) -> None:
        self._writer.write(frame)

    async def receive(self) -> FromEngine:
        """Raises EOFError or OSError when the process is gone, ValueError for a frame that is none of ours."""
        length = checked_length(*HEADER.unpack(await self._reader.readexactly(HEADER.size)))
        message: FromEngine = from_engine_decoder.decode(await self._reader.readexactly(length))
        self.last_frame = time.monotonic()
        return message

    def cut(self) -> None:
        """Close the socket at once, whatever is in flight: the reader sees the end."""
        self._writer.transport.abort()

    async def end(self, grace: float = 0.0) -> int:
        """Wait `grace` seconds for the process to exit, kill it otherwise; returns its exit status."""
        deadline = time.monotonic() + grace
        while self.process.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        if self.process.poll() is None:
            self.process.kill()
        status = await asyncio.to_thread(self.process.wait)
        self.cut()
        return status


def default_command() -> list[str]:
    """How the engine process is started: this interpreter, without the working directory unless we use it too."""
    searches_here = "" in sys.path or os.getcwd() in sys.path
    return [sys.executable, *([] if searches_here else ["-P"]), "-m", "fastserve.engine.process"]


def describe_status(status: int) -> str:
    """How a process ended, from its exit status."""
    if status >= 0:
        return f"with exit status {status}"
    hint = " (is there enough memory?)" if status == -signal.SIGKILL else ""
    return f"by signal {signal.Signals(-status).name}{hint}"
