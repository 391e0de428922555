"""The parent's half of a comparison: start an engine in its own process and environment, ask it, read its memory."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peers

from fastserve.bench import workload

OURS = "fastserve"


class PipedProcess:
    """An engine in a process of its own, answering a line of JSON for a line of JSON until it is closed.

    Args:
        name: what messages call it.
        command: what to run; its messages go to stderr.
        environment: variables besides ours.

    Attributes:
        about: its first line, which says that it is ready.

    Raises:
        RuntimeError: it ended before it was ready.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self.name = name
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **offline, **(environment or {})},
        )
        self.about: dict[str, Any] = self._answer()

    def close(self) -> None:
        """End the process, and all that it started."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            for pid in reversed(_tree(self._process.pid)):
                os.kill(pid, 9)

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self._process.wait()}; its messages are above")
        answer: dict[str, Any] = json.loads(line)
        return answer


class EngineProcess(PipedProcess):
    """One engine that generates.

    Args:
        name: a peer, or OURS.
        model: its form of the model.
        precision: bf16, int8 or int4.
        beside: the peer that OURS is measured beside.

    Raises:
        RuntimeError: the engine ended before it was ready.
    """

    def __init__(self, name: str, model: Path, precision: str, beside: peers.Peer) -> None:
        python = sys.executable if name == OURS else str(peers.interpreter(name))
        script = peers.ENGINES / f"run_{'ours' if name == OURS else name.replace('.', '_')}.py"
        environment = {"LLAMA_CPP_TOOLS": str(peers.llama_cpp_tools())} if name == "llama.cpp" else None
        if name == OURS:
            environment = {"OUR_KV_CACHE": beside.our_kv_cache, "OUR_KV_MIB": str(beside.our_kv_mib)}
        super().__init__(name, [python, str(script), str(model), precision], environment)

    def ask(self, case: str, prompts: Sequence[workload.Prompt]) -> dict[str, Any]:
        """The answer to one question (see peer_engines/worker.py)."""
        return self._ask({"case": case, "prompts": [(item.token_ids, item.num_outputs) for item in prompts]})

    def peak_bytes(self) -> int:
        """Largest resident memory of the engine since `forget_peak`, all its processes together."""
        return sum(_high_water(pid) for pid in _tree(self._process.pid))

    def forget_peak(self) -> None:
        for pid in _tree(self._process.pid):
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")


def _tree(pid: int) -> list[int]:
    """A process and all that it started, parents first."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += [int(child) for child in children.read_text(encoding="ascii").split()]
    return found


def _high_water(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
