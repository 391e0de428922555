"""The other commands with the real engine, and what they say when a model folder is damaged."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests import folders
from tests.e2e.conftest import FASTSERVE, SMALL

pytestmark = pytest.mark.slow  # each command loads torch anew


def fastserve(*arguments: str, text: str = "", timeout: float = 90) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*FASTSERVE, *arguments], input=text, capture_output=True, text=True, timeout=timeout)


def test_generate(tiny_model):
    prompts = ["-p", "Once upon a time", "-p", "The fox"]
    sampling = ["--max-tokens", "8", "--temperature", "0"]
    plain = fastserve("generate", str(tiny_model), *prompts, *sampling, *SMALL)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.startswith("Once upon a time")
    lines = fastserve("generate", str(tiny_model), *prompts, *sampling, *SMALL, "--json").stdout.splitlines()
    results = [json.loads(line) for line in lines]
    assert [result["prompt"] for result in results] == ["Once upon a time", "The fox"]
    assert [len(result["outputs"][0]["token_ids"]) for result in results] == [8, 8]


def test_info(tiny_model):
    result = fastserve("info", str(tiny_model), "--json", *SMALL)
    assert result.returncode == 0, result.stderr
    info = json.loads(result.stdout)
    assert info["architecture"] == "LlamaForCausalLM"
    # Two embeddings of 320 x 64, two layers (q and o 64 x 64, k and v 64 x 32, three of 64 x 128, two norms), a norm.
    assert info["num_parameters"] == 2 * 320 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64
    assert info["max_model_len"] == 512
    assert info["kv_cache_bytes"] <= 16 * 2**20
    assert any(line.startswith("kernels: ") for line in info["decisions"])
    text = fastserve("info", str(tiny_model), *SMALL).stdout
    assert "LlamaForCausalLM" in text
    assert "longest sequence" in text


def test_chat_in_this_process(tiny_model):
    result = fastserve("chat", str(tiny_model), "--max-tokens", "12", *SMALL, text="hello\nand then?\n/exit\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_ctrl_c_in_a_terminal_stops_the_answer_then_the_program(tmp_path):
    talker = folders.llama(tmp_path / "talker", max_position_embeddings=20_000)  # does not end by itself in time
    command = [*FASTSERVE, "chat", str(talker), "--ignore-eos", *SMALL]
    process_id, terminal = pty.fork()
    if process_id == 0:
        os.execv(command[0], command)

    def read_until(text: bytes) -> bytes:
        seen, deadline = b"", time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([terminal], [], [], 0.1)[0]:
                seen += os.read(terminal, 4096)
        return seen

    def press_ctrl_c_until_it_ends() -> int:
        """Python's line editor can miss a signal that comes just before it waits for input; a person presses again."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            os.write(terminal, b"\x03")
            for _ in range(20):
                ended, status = os.waitpid(process_id, os.WNOHANG)
                if ended:
                    return os.waitstatus_to_exitcode(status)
                time.sleep(0.1)
        raise AssertionError("Ctrl-C did not end it")

    try:
        read_until(b"> ")
        os.write(terminal, b"hello\n")
        read_until(b"hello\r\n")
        while len(os.read(terminal, 64)) == 0:  # the answer has begun
            pass
        os.write(terminal, b"\x03")
        read_until(b"[stopped]\r\n> ")
        # The second value: a further press came while the interpreter was being taken down. A shell shows 130 for both.
        assert press_ctrl_c_until_it_ends() in (130, -signal.SIGINT)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGKILL)
        os.close(terminal)


def test_too_little_memory_names_the_setting(tiny_model):
    result = fastserve("info", str(tiny_model), "--kv-cache-memory", "1KiB")
    assert result.returncode == 3
    [line] = result.stderr.splitlines()
    assert "kv_cache_memory" in line


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "missing"])
def test_damaged_weights_are_one_line_that_names_the_file(copy, damage):
    weights = copy / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "garbage":
        weights.write_bytes(b"\xff" * 5000)
    else:
        weights.unlink()
    commands = (
        [["serve", "--port", "0"], ["generate", "-p", "x"]] if damage == "truncated" else [["serve", "--port", "0"]]
    )
    for command in commands:
        result = fastserve(command[0], str(copy), *command[1:], *SMALL)
        assert result.returncode == 3
        [line] = [line for line in result.stderr.splitlines() if line.startswith("fastserve: ")]
        assert str(copy) in line
        assert "Traceback" not in result.stderr
