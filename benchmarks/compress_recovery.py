"""Whether a teacher is worth it, and what training gives back after pruning: perplexity on text that nothing saw.

    python benchmarks/compress_recovery.py             # the built-in model, the shared folder's stories; 15 minutes
    python benchmarks/compress_recovery.py --smoke     # two steps of each

Distillation: a student of half the model's weights, random at first, learns from the text alone (`scratch`) and from
the text and the model's probabilities (`distilled`): the same first weights, windows, order and rate.
`distilled_layers` begins with every other layer of the model instead, which is about as large. Recovery: 30 % of the
channels of every layer's feed-forward go (`pruned`), then the network that is left is trained (`mended`). Prints a
table, and one JSON line: metrics.perplexity.*, metrics.{distilled,distilled_layers}_over_scratch (above 1: distilling
is better) and metrics.recovered_share (of what pruning lost; 1 is all of it).
"""

from __future__ import annotations

import argparse
import gzip
import sys
import tempfile
from pathlib import Path
from typing import Any

from shared_data import add_text_options, text_settings

from fastserve.bench.report import Report, emit, rounded
from fastserve.checkpoint.folder import ModelFolder
from fastserve.compress.evaluate import compare
from fastserve.compress.recipe import Evaluation, make_recipe
from fastserve.compress.run import compress

TRAINING_CHARACTERS = 6_000_000


def read_text(file: Path, num_characters: int) -> str:
    """The beginning of a text file, packed or not."""
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        return lines.read(num_characters)


def half_shape(config: dict[str, Any]) -> dict[str, int]:
    """Keys of config.json that leave about half of the weights: fewer layers, and narrower feed-forwards."""
    inner = config["intermediate_size"]
    return {
        "num_hidden_layers": max(1, config["num_hidden_layers"] // 2),
        "intermediate_size": max(64, inner * 5 // 6 // 64 * 64),
    }


def variants(
    shape: dict[str, int], num_layers: int, steps: int, recovery_steps: int
) -> dict[str, list[dict[str, Any]]]:
    """Name -> the recipe's steps."""
    student = {"do": "distill", "shape": shape, "steps": steps, "learning_rate": 2e-3}
    layers = {
        "do": "distill",
        "layers": list(range(0, num_layers - 1, 2)),
        "steps": steps,
        "learning_rate": 1e-3,
        "temperature": 1.0,
    }
    prune = {"do": "prune", "method": "channels", "ratio": 0.3}
    return {
        "scratch": [{**student, "soft": 0.0, "hard": 1.0}],
        "distilled": [{**student, "soft": 1.0, "hard": 0.5, "temperature": 1.0}],
        "distilled_layers": [layers],
        "pruned": [prune],
        "mended": [prune, {"do": "distill", "steps": recovery_steps, "learning_rate": 5e-4}],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_options(parser, 16384, "training", "stories_train.txt.gz")
    parser.add_argument("--steps", type=int, default=300, help="of the students, 2,048 tokens each")
    parser.add_argument("--recovery-steps", type=int, default=100)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.steps, arguments.recovery_steps, arguments.tokens = 2, 2, 1024
    source = ModelFolder.open(arguments.model)
    shape = half_shape(source.config)
    plain = text_settings(arguments, "training")
    report = Report("compress_recovery", config={**plain, "student": shape, "dtype": "float32"})
    judge = Evaluation(str(arguments.text), arguments.tokens)
    with tempfile.TemporaryDirectory() as scratch:
        training = Path(scratch) / "training.txt"
        training.write_text(read_text(arguments.training, TRAINING_CHARACTERS), encoding="utf-8")
        looked_at = {"text": str(training), "samples": 32, "length": 256}
        num_layers = source.config["num_hidden_layers"]
        for name, steps in variants(shape, num_layers, arguments.steps, arguments.recovery_steps).items():
            recipe = make_recipe({"steps": steps, "calibration": looked_at})
            folder = compress(arguments.model, Path(scratch) / name, recipe)
            loss = compare(source, folder, judge, lambda *_: None)
            report.metrics["perplexity.original"] = rounded(loss.original_perplexity, 6)
            report.metrics[f"perplexity.{name}"] = rounded(loss.perplexity, 6)
            report.metrics[f"megabytes.{name}"] = rounded(folder.weight_bytes / 1e6)
            print(f"{name:10s} perplexity {loss.perplexity:9.4f}", file=sys.stderr, flush=True)
    found = {name.removeprefix("perplexity."): report.metrics[name] for name in list(report.metrics)}
    for name in ("distilled", "distilled_layers"):
        report.metrics[f"{name}_over_scratch"] = rounded(found["scratch"] / found[name], 4)
    lost = found["pruned"] - found["original"]
    report.metrics["recovered_share"] = rounded((found["pruned"] - found["mended"]) / lost, 4)
    emit(report.as_dict())


if __name__ == "__main__":
    main()
