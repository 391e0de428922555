"""Two processes on this machine: the same losses as one, resuming on another number, lost processes and saves."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastserve.train.checkpoints import whole_checkpoints
from fastserve.train.pretrain import pretrain
from tests.conftest import REPOSITORY
from tests.unit.train.conftest import LLAMA, log_of, losses_of, make_recipe, recipe_values

pytestmark = pytest.mark.slow
STEPS = 50
HALF = 25


def write_toml(path: Path, values: dict[str, Any]) -> Path:
    """The values as TOML: tables of tables with scalars, lists and inline tables."""

    def line(value: Any) -> str:
        if isinstance(value, dict):
            return "{ " + ", ".join(f"{name} = {line(item)}" for name, item in value.items()) + " }"
        return json.dumps(value)

    path.write_text("".join(f"{name} = {line(value)}\n" for name, value in values.items()), encoding="utf-8")
    return path


def start(recipe: Path, run: Path, nproc: int = 2) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastserve.cli.main", "pretrain", str(recipe), "--out", str(run)]
    return started([*command, "--nproc", str(nproc), "--json"])


def started(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return output


def sections(optimizer: str = "adamw", **parallel: int) -> dict[str, Any]:
    return {
        "model": {"type": "qwen3", "config": {**LLAMA, "head_dim": 8}},
        "optimizer": {"kind": optimizer},
        "train": {"steps": STEPS, "evaluate_every": STEPS, "checkpoint_every": HALF, "micro_batch_tokens": 64},
        "parallel": parallel,
    }


@pytest.fixture(scope="module")
def alone(corpora: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    pretrain(make_recipe(corpora["bpe"], **sections()), run)
    return run


@pytest.mark.parametrize("parallel", [{"data": 2}, {"shard": 2}, {"tensor": 2}, {"pipeline": 2}], ids=str)
def test_two_processes_agree_with_one_and_one_goes_on_from_two(
    corpora: dict[str, Path], alone: Path, tmp_path: Path, parallel: dict[str, int]
) -> None:
    values = recipe_values(corpora["bpe"], **sections(**parallel))
    run = tmp_path / "run"
    measured = json.loads(finish(start(write_toml(tmp_path / "recipe.toml", values), run)))
    expected, found = losses_of(alone), losses_of(run)
    assert expected.keys() == found.keys()
    assert all(math.isclose(expected[step], found[step], rel_tol=1e-4) for step in expected)
    card = json.loads((alone / "model" / "fastserve.json").read_text())
    assert math.isclose(measured["held_out_loss"], card["measured"]["held_out_loss"], rel_tol=1e-4)

    # One process takes up the checkpoint that two wrote in the middle.
    newest = whole_checkpoints(run / "checkpoints")
    assert [path.name for path in newest][-1] == f"step-{STEPS:08d}"
    newest[-1].rename(tmp_path / "aside")
    (run / "log.jsonl").unlink()
    pretrain(make_recipe(corpora["bpe"], **sections()), run)
    again = losses_of(run)
    assert min(again) == HALF + 1 and all(math.isclose(expected[step], again[step], rel_tol=1e-4) for step in again)


def test_muon_on_shards(corpora: dict[str, Path], tmp_path: Path) -> None:
    """Its products are in bfloat16 in any run, so that differences grow over time; a few steps show it right."""
    steps = {"steps": 12, "evaluate_every": 12}
    values = recipe_values(corpora["bpe"], **sections("muon", shard=2))
    values["train"].update(steps)
    finish(start(write_toml(tmp_path / "recipe.toml", values), tmp_path / "run"))
    alone = sections("muon")
    alone["train"].update(steps)
    pretrain(make_recipe(corpora["bpe"], **alone), tmp_path / "alone")
    expected, found = losses_of(tmp_path / "alone"), losses_of(tmp_path / "run")
    assert len(expected) == 12
    assert all(math.isclose(expected[step], found[step], rel_tol=1e-4) for step in expected)


def test_a_run_survives_the_loss_of_a_process(corpora: dict[str, Path], alone: Path, tmp_path: Path) -> None:
    """kill -9 of one process in mid-run: the run goes on from the last checkpoint by itself, to the same losses."""
    values = recipe_values(corpora["bpe"], **sections(shard=2))
    run = tmp_path / "run"
    process = start(write_toml(tmp_path / "recipe.toml", values), run)
    for _ in wait():
        if (run / "log.jsonl").exists() and max(losses_of(run), default=0) > HALF:
            break
    # The steps after the checkpoint take long enough for the signal to arrive before the end: hold one process.
    workers = children(process.pid)
    os.kill(workers[-1], signal.SIGKILL)
    finish(process)
    expected, found = losses_of(alone), losses_of(run)
    assert expected.keys() == found.keys()
    assert all(math.isclose(expected[step], found[step], rel_tol=1e-4) for step in expected)
    steps = [line["step"] for line in log_of(run) if "loss" in line]
    assert steps != sorted(set(steps)), "no step was done twice: the process was lost too late"


def test_an_interrupt_ends_all_processes_after_the_step(corpora: dict[str, Path], alone: Path, tmp_path: Path) -> None:
    recipe = write_toml(tmp_path / "recipe.toml", recipe_values(corpora["bpe"], **sections(data=2)))
    run = tmp_path / "run"
    process = start(recipe, run)
    for _ in wait():
        if (run / "log.jsonl").exists() and losses_of(run):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors, errors
    last = max(losses_of(run))
    assert last < STEPS and whole_checkpoints(run / "checkpoints")[-1].name == f"step-{last:08d}"
    finish(start(recipe, run))
    expected, found = losses_of(alone), losses_of(run)
    assert all(math.isclose(expected[step], found[step], rel_tol=1e-4) for step in expected)


_KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from fastserve.train import checkpoints
from fastserve.train.pretrain import pretrain
from fastserve.train.settings import read_recipe
write, finish = HuggingFaceStorageWriter.write_data, checkpoints.Checkpoints._complete
def killed(self, plan, planner):
    if "00000050" in str(self.path):
        (self.fs.mkdir(self.path), open(Path(self.path) / "shard-00001-model-00001-of-00001.safetensors", "wb").close())
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, plan, planner)
HuggingFaceStorageWriter.write_data = killed
pretrain(read_recipe(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def test_a_kill_during_a_save_leaves_the_checkpoint_before(
    corpora: dict[str, Path], alone: Path, tmp_path: Path
) -> None:
    recipe = write_toml(tmp_path / "recipe.toml", recipe_values(corpora["bpe"], **sections()))
    command = [sys.executable, "-c", _KILLED_WHILE_SAVING, str(recipe), str(tmp_path / "run")]
    result = subprocess.run(command, cwd=REPOSITORY, timeout=200, capture_output=True, check=False)
    assert result.returncode == -signal.SIGKILL
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000000", "step-00000025", "step-00000050.partial"]
    assert [path.name for path in whole_checkpoints(folder)][-1] == "step-00000025"
    pretrain(make_recipe(corpora["bpe"], **sections()), tmp_path / "run")
    assert losses_of(tmp_path / "run") == losses_of(alone)


def test_two_processes_tune_as_one_does(tmp_path: Path) -> None:
    """`finetune --nproc 2`: each batch is shared, so losses and weights are those of one process but for rounding."""
    from safetensors.torch import load_file

    from tests.unit.train.finetune.test_finetune import SMALL, facts, make_folder, write

    config = {**SMALL, "max_position_embeddings": 128, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = make_folder(tmp_path / "bert", "bert", config, "AutoModelForMaskedLM", kind="wordpiece", vocab_size=120)
    rows = [{"text": fact["text"], "label": fact["place"]} for fact in facts(60)]
    data = write(tmp_path / "data.jsonl", rows)
    runs = {number: tmp_path / f"run-{number}" for number in (1, 2)}
    command = [sys.executable, "-m", "fastserve.cli.main", "finetune", "classification", str(bert), "--data", str(data)]
    options = ["--steps", "12", "--batch-size", "8", "--max-length", "64", "--precision", "float32", "--json"]
    options += ["--learning-rate", "0.005"]
    for number, run in runs.items():
        finish(started([*command, "--out", str(run), "--nproc", str(number), *options]))
    logs = [losses_of(run) for run in runs.values()]
    assert logs[0].keys() == logs[1].keys()
    assert all(math.isclose(logs[0][step], logs[1][step], rel_tol=1e-4) for step in logs[0])
    weights = [load_file(run / "model" / "model.safetensors") for run in runs.values()]
    assert all((weights[0][name] - weights[1][name]).abs().max() < 1e-3 for name in weights[0])


def wait(seconds: float = 150) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def children(pid: int) -> list[int]:
    import psutil

    return [
        child.pid for child in psutil.Process(pid).children(recursive=True) if "worker" in " ".join(child.cmdline())
    ]
