"""`fastserve finetune`: tune a model folder on examples."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastserve.cli.options import ConfigFile, with_options
from fastserve.core.errors import ConfigError
from fastserve.train.finetune.settings import TASKS, FinetuneSettings


@with_options((FinetuneSettings, "Tuning"))
def finetune(
    options: dict[str, Any],
    task: Annotated[str, typer.Argument(help=", ".join(TASKS) + ".")],
    model: Annotated[str, typer.Argument(help="Model folder.")],
    data: Annotated[Path, typer.Option(help="Examples: .jsonl, .json (also SQuAD's), .csv, .tsv or .parquet.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; the tuned folder is OUT/model.")],
    nproc: Annotated[int, typer.Option(help="Processes on this machine; they share each batch.", min=1)] = 1,
    max_restarts: Annotated[int, typer.Option(help="How often lost processes are started again.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as one JSON object.")] = False,
    config: ConfigFile = None,
) -> None:
    """Tune a model on examples, or go on with a run that was stopped.

    Scores on held-out examples, before and after, go into the folder's card.
    """
    if task not in TASKS:
        raise ConfigError(f"the task must be one of {', '.join(TASKS)}, not {task!r}")
    from fastserve.checkpoint.folder import ModelFolder
    from fastserve.train.finetune.run import tune
    from fastserve.train.recipe import build_section, read_toml

    values = read_toml(config) if config is not None else {}
    settings = build_section(FinetuneSettings, {**values, **options}, "")
    measured = tune(task, str(ModelFolder.open(model).path), data, out, settings, nproc, max_restarts)
    if as_json:
        print(json.dumps(measured))
        return
    for name, value in measured.items():
        if name != "before":
            print(
                f"{name.replace('_', ' '):20} {measured['before'].get(name, float('nan')):>10} before {value:>10} after"
            )
    print(f"Next: fastserve serve {out / 'model'}", file=sys.stderr)
