"""Start a server as a process of its own and look at it from outside: its banner, children and listening sockets."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class ServerProcess:
    """A running server; `url` comes from its banner."""

    def __init__(self, process: subprocess.Popen[str], banner: str) -> None:
        self.process = process
        self.banner = banner
        match = re.search(r"http://[\d.]+:\d+", banner)
        assert match is not None, banner
        self.url = match.group()

    @property
    def engine_id(self) -> int:
        """Process id of the engine."""
        [engine] = children(self.process.pid)
        return engine

    def end(self, seconds: float = 10.0) -> tuple[int, str]:
        """Wait for its end: exit status and the rest of its output."""
        output, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, output

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Signal it and wait for its end."""
        self.process.send_signal(number)
        return self.end()


@contextmanager
def started(command: list[str], environment: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    """Run `command` until the banner was printed; whatever happens, nothing is left behind.

    Raises:
        AssertionError: it ended before; the message is all of its output.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, **(environment or {})},
    )
    assert process.stdout is not None
    try:
        banner = ""
        for line in process.stdout:
            banner += line
            if "curl -N" in line:
                break
        assert "curl -N" in banner, banner
        yield ServerProcess(process, banner)
    finally:
        process.kill()
        process.communicate()


def children(process_id: int) -> list[int]:
    """Process ids of the direct children."""
    text = Path(f"/proc/{process_id}/task/{process_id}/children").read_text()
    return [int(item) for item in text.split()]


def num_listening(process_ids: list[int]) -> int:
    """How many TCP sockets these processes listen on."""
    links = set()
    for process_id in process_ids:
        for descriptor in Path(f"/proc/{process_id}/fd").iterdir():
            try:
                target = os.readlink(descriptor)
            except FileNotFoundError:  # closed since it was listed
                continue
            match = re.fullmatch(r"socket:\[(\d+)\]", target)
            links |= {match.group(1)} if match else set()
    lines = [line for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    listening = {fields[9] for fields in map(str.split, lines) if fields[3] == "0A"}
    return len(links & listening)
