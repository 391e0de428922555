"""The other commands with the real engine, and what they say when a model folder is damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import FASTSERVE, SMALL


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
    for command in (["serve", "--port", "0"], ["generate", "-p", "x"]):
        result = fastserve(command[0], str(copy), *command[1:], *SMALL)
        assert result.returncode == 3
        [line] = [line for line in result.stderr.splitlines() if line.startswith("fastserve: ")]
        assert str(copy) in line
        assert "Traceback" not in result.stderr
