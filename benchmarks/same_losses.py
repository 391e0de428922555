"""The same run on one process and on two: losses over 50 steps, after a stop, and on another number of processes.

    python benchmarks/same_losses.py            a few minutes on two cores
    python benchmarks/same_losses.py --smoke    8 steps

Every run is pretraining by the same recipe, texts and seed, in float32, with another [parallel] table: DDP, FSDP2,
tensor parallel and a pipeline of two stages on two processes. A difference is the largest over the steps, relative to
one process. The texts are told by the built-in model's story grammar, so that nothing is needed but the repository.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import torch

from fastserve.bench.report import Report, emit
from fastserve.train.checkpoints import whole_checkpoints
from fastserve.train.data.prepare import prepare
from fastserve.train.data.settings import PrepareSettings
from fastserve.train.launch import launch
from fastserve.train.pretrain import pretrain
from fastserve.train.settings import read_recipe
from fastserve.train.storyteller.plots import StoryGrammar
from fastserve.train.tokenizer import TokenizerSettings, make_tokenizer_folder, texts_of

RECIPE = """
name = "same-losses"
seed = 11
[model]
type = "llama"
dtype = "float32"
[model.config]
hidden_size = 128
intermediate_size = 384
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 256
[data]
length = 128
validation_tokens = 4096
[data.sources]
stories = "{data}"
[optimizer]
kind = "{optimizer}"
learning_rate = 0.003
warmup_steps = 5
[train]
batch_tokens = 2048
micro_batch_tokens = 512
steps = {steps}
precision = "float32"
evaluate_every = {steps}
checkpoint_every = {half}
[watch]
tensorboard = false
report_every = 1
[parallel]
{parallel}
"""
MESHES = {"ddp": "data = 2", "fsdp2": "shard = 2", "tensor": "tensor = 2", "pipeline": "pipeline = 2"}


class Runs:
    """Makes runs of the recipe in a folder."""

    def __init__(self, root: Path, num_steps: int, optimizer: str) -> None:
        self.root, self.num_steps, self.half, self._optimizer = root, num_steps, num_steps // 2, optimizer

    def make_data(self) -> None:
        grammar, chooser = StoryGrammar(frozenset(), [], {}), random.Random(5)
        source, tokenizer = self.root / "stories.jsonl", self.root / "tokenizer"
        source.write_text("".join(json.dumps({"text": grammar.tell(chooser).text}) + "\n" for _ in range(1500)))
        make_tokenizer_folder(texts_of([str(source)]), tokenizer, TokenizerSettings(vocab_size=1024))
        rules = PrepareSettings(quality=False, near_duplicates=False, validation_share=0.05, workers=1)
        prepare([str(source)], self.root / "data", rules, tokenizer)

    def run(self, name: str, parallel: str = "") -> Path:
        """Run to the end, from the folder's last checkpoint if there is one; returns the folder."""
        recipe, folder = self.root / f"{name}.toml", self.root / name
        values = {"steps": self.num_steps, "half": self.half, "optimizer": self._optimizer}
        recipe.write_text(RECIPE.format(data=self.root / "data", parallel=parallel, **values))
        if parallel:
            launch(recipe, folder, num_processes=2, max_restarts=0)
        else:
            pretrain(read_recipe(recipe), folder)
        return folder

    def cut_at_half(self, name: str, new_name: str) -> None:
        """A copy of a run as it stood at its middle checkpoint."""
        folder = self.root / new_name
        shutil.copytree(self.root / name, folder, symlinks=True)
        for path in whole_checkpoints(folder / "checkpoints"):
            if path.name > f"step-{self.half:08d}":
                shutil.rmtree(path)
        for left in ("models", "log.jsonl", "model"):
            path = folder / left
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def losses(folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def largest_difference(expected: dict[int, float], found: dict[int, float]) -> float:
    """Relative, over the steps of `found`, all of which `expected` must have."""
    return max(abs(found[step] - expected[step]) / abs(expected[step]) for step in found)


def same_weights(first: Path, second: Path) -> bool:
    """Whether two runs ended in the same exported weights, byte for byte."""
    name = Path("model") / "model.safetensors"
    return (first / name).read_bytes() == (second / name).read_bytes()


def measure(runs: Runs, report: Report) -> None:
    runs.make_data()
    alone = runs.run("alone")
    expected = losses(alone)
    report.metrics["first_loss"], report.metrics["last_loss"] = expected[1], expected[runs.num_steps]
    runs.cut_at_half("alone", "resumed")
    resumed = runs.run("resumed")
    again = losses(resumed)
    report.metrics["steps_after_resume"] = len(again)
    report.metrics["resumed_losses_equal"] = float(all(again[step] == expected[step] for step in again))
    report.metrics["resumed_weights_equal_to_the_bit"] = float(same_weights(alone, resumed))
    for name, parallel in MESHES.items():
        found = losses(runs.run(name, parallel))
        assert found.keys() == expected.keys(), f"{name} did other steps"
        report.metrics[f"{name}_2_difference"] = largest_difference(expected, found)
        runs.cut_at_half(name, f"{name}-on-one")
        taken_up = losses(runs.run(f"{name}-on-one"))
        assert min(taken_up) == runs.half + 1, f"one process did not go on from the checkpoint of {name}"
        report.metrics[f"{name}_2_resumed_on_1_difference"] = largest_difference(expected, taken_up)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--smoke", action="store_true", help="8 steps")
    options = parser.parse_args()
    if options.smoke:
        options.steps = 8
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started
    torch.set_num_threads(1)
    report = Report(
        "same_losses", config={"steps": options.steps, "optimizer": options.optimizer, "precision": "float32"}
    )
    with tempfile.TemporaryDirectory() as name:
        measure(Runs(Path(name), options.steps, options.optimizer), report)
    emit(report.as_dict())
    differences = [value for name, value in report.metrics.items() if name.endswith("_difference")]
    if max(differences) > 1e-4 or not report.metrics["resumed_weights_equal_to_the_bit"]:
        raise SystemExit("runs differ by more than 1e-4, or resuming is not exact")


if __name__ == "__main__":
    main()
