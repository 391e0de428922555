"""`fastserve eval`: measure a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastserve.cli.options import with_options
from fastserve.core.errors import ConfigError
from fastserve.train.finetune.settings import TASKS, FinetuneSettings

_TRAINING_ONLY = [
    "validation",
    "validation_share",
    "epochs",
    "steps",
    "batch_size",
    "micro_batch_size",
    "group_by_length",
    "optimizer",
    "learning_rate",
    "muon_learning_rate",
    "weight_decay",
    "warmup_share",
    "precision",
    "gradient_checkpointing",
    "dtype",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_targets",
    "dora",
    "qlora",
    "merge",
    "beta",
    "temperature",
    "seed",
]


@with_options((FinetuneSettings, "Examples"), leave_out=tuple(_TRAINING_ONLY))
def evaluate(
    options: dict[str, Any],
    model: Annotated[str, typer.Argument(help="Model folder; with --url its tokenizer is used.")],
    corpus: Annotated[
        Path | None, typer.Option(help="Text to measure perplexity on; JSON lines and Parquet by --text-key.")
    ] = None,
    task: Annotated[str, typer.Option(help="Score examples of a task: " + ", ".join(TASKS) + ".")] = "",
    data: Annotated[Path | None, typer.Option(help="The examples.")] = None,
    harness: Annotated[list[str] | None, typer.Option(help="Task of lm-evaluation-harness; again for more.")] = None,
    harness_folder: Annotated[str, typer.Option(help="Folder with task files of your own.")] = "",
    url: Annotated[str, typer.Option(help="Server for the harness; without it in process.")] = "",
    limit: Annotated[int, typer.Option(help="Examples per task of the harness; 0: all.")] = 0,
) -> None:
    """Measure a model: perplexity on a corpus, scores on examples, lm-evaluation-harness.

    Prints one JSON object with a key per measurement.
    """
    from fastserve.checkpoint.folder import ModelFolder
    from fastserve.train import evaluate as measuring

    folder = str(ModelFolder.open(model).path)
    found: dict[str, Any] = {}
    if corpus is not None:
        if not corpus.exists():
            raise ConfigError(f"there is no file or folder {corpus}")
        found["corpus"] = measuring.perplexity(folder, corpus, text_key=options.get("text_key", "text"))
    if task:
        if task not in TASKS or task == "preference":
            raise ConfigError(f"task must be one of {', '.join(name for name in TASKS if name != 'preference')}")
        if data is None:
            raise ConfigError("--task needs --data with its examples")
        found[task] = measuring.score_examples(task, folder, data, FinetuneSettings(**options))
    if harness:
        found["harness"] = measuring.harness(folder, harness, url=url, limit=limit, task_folder=harness_folder)
    if not found:
        raise ConfigError("say what to measure: --corpus, --task with --data, or --harness")
    print(json.dumps(found, ensure_ascii=False))
