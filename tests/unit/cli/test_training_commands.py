"""The commands of training: help with examples, whole runs in small, and one line for mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastserve.cli.main import app

COMMANDS = ["data prepare", "tokenizer train", "pretrain", "finetune", "eval", "tune"]
RECIPE = """
name = "toy"
[model]
type = "llama"
dtype = "float32"
config = { hidden_size = 32, intermediate_size = 64, num_hidden_layers = 2, num_attention_heads = 4 }
[data]
sources = { tales = "OUT" }
length = 16
[optimizer]
learning_rate = 1e-3
[train]
batch_tokens = 64
steps = 2
precision = "float32"
[watch]
tensorboard = false
"""


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    assert f"Example: fastserve {command}" in " ".join(run(*command.split(), "--help").split())


def test_from_text_to_a_measured_model(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"The {number} foxes went home over hill {number}." for number in range(200)))
    prepare = ["data", "prepare", str(corpus), "--out", str(tmp_path / "out"), "--text-documents", "line"]
    prepare += ["--min-words", "3", "--no-near-duplicates", "--validation-share", "0.1", "--workers", "1"]
    assert "200 documents" in run(*prepare)
    report = run(
        "tokenizer", "train", str(tmp_path / "out"), "--out", str(tmp_path / "t"), "--vocab-size", "300", "--json"
    )
    assert json.loads(report)["exact_round_trips"] == 1.0
    packed = json.loads(run(*prepare, "--tokenizer", str(tmp_path / "t"), "--json"))
    assert packed["tokens"]["train"] > 1000
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.replace("OUT", str(tmp_path / "out")))
    assert "memory per process" in run("pretrain", str(recipe), "--plan", "--accelerator", "h100")
    measured = json.loads(run("pretrain", str(recipe), "--out", str(tmp_path / "run"), "--json"))
    found = json.loads(run("eval", str(tmp_path / "run" / "model"), "--corpus", str(tmp_path / "out")))
    assert found["corpus"]["loss"] == pytest.approx(measured["held_out_loss"], abs=0.5)
    keyed = tmp_path / "keyed.jsonl"
    keyed.write_text(json.dumps({"body": "The foxes went home over the hill."}) + "\n")
    found = json.loads(run("eval", str(tmp_path / "run" / "model"), "--corpus", str(keyed), "--text-key", "body"))
    assert found["corpus"]["tokens"] > 5
    run("tokenizer", "train", str(keyed), "--out", str(tmp_path / "k"), "--vocab-size", "270", "--text-key", "body")


def test_eval_offers_no_option_of_training() -> None:
    words = set(run("eval", "--help").split())
    assert "--text-key" in words and not words & {"--optimizer", "--muon-learning-rate", "--qlora", "--temperature"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrain", "/none.toml"], "no recipe at /none.toml"),
        (["finetune", "cooking", ".", "--data", "x", "--out", "y"], "the task must be one of"),
        (["tune", "/none.toml", "--out", "x"], "no recipe"),
        (["data", "prepare", "/none", "--out", "x"], "no file or folder /none"),
        (["data", "prepare", "/none", "--out", "x", "--similarity", "2"], "similarity must be"),
        (["tokenizer", "train", "/none", "--out", "x", "--kind", "bytes"], "kind must be one of"),
        (["tokenizer", "train", ".", "--out", "/dev/null"], "/dev/null is no folder; choose another --out"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and message in result.stderr
    assert result.stderr.count("\n") == 1
