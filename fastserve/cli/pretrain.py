"""`fastserve pretrain`: train a network from a recipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastserve.core.config import format_bytes

if TYPE_CHECKING:
    from fastserve.train.plan import Plan


def pretrain(
    recipe: Annotated[Path, typer.Argument(help="TOML file; see configs/ for examples.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; runs/NAME without it.", show_default=False)
    ] = None,
    nproc: Annotated[int, typer.Option(help="Processes on this machine; [parallel] says how they share.")] = 1,
    max_restarts: Annotated[int, typer.Option(help="How often lost processes are started again.")] = 3,
    launcher: Annotated[str, typer.Option(help="What starts them: local, or ray (Ray Train on a cluster).")] = "local",
    plan: Annotated[
        bool, typer.Option("--plan", help="Print what it would take in memory and time, and stop.")
    ] = False,
    accelerator: Annotated[str, typer.Option(help="For --plan: h100, h200, a100, l40s, rtx4090 or cpu.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan or the result as one JSON object.")] = False,
) -> None:
    """Train a network from a recipe, or go on with a run that was stopped.

    The run's folder holds the log, checkpoints and a model folder of every evaluation. Across machines, start
    `python -m fastserve.train.worker RECIPE RUN` with torchrun.
    """
    from fastserve.train.settings import read_recipe

    chosen = read_recipe(recipe)
    run = out or Path("runs") / chosen.name
    if plan:
        from fastserve.train.plan import plan as make_plan
        from fastserve.train.pretrain import plan_config

        made = make_plan(chosen, plan_config(chosen), accelerator)
        print(json.dumps(made.as_dict()) if as_json else _table(made))
        return
    from fastserve.train import launch
    from fastserve.train.pretrain import check, pretrain

    check(chosen, nproc)
    launch.check(launcher)
    if nproc > 1 or launcher != "local":
        launch.launch(recipe, run, nproc, max_restarts, launcher)
        card = json.loads((run / "model" / "fastserve.json").read_text(encoding="utf-8"))
        measured = card["measured"]
    else:
        measured = pretrain(chosen, run)
    print(json.dumps(measured, ensure_ascii=False) if as_json else f"{run / 'model'}: {_line(measured)}")
    if not as_json:
        print(f"Next: fastserve serve {run / 'model'}", file=sys.stderr)


def _line(measured: dict[str, object]) -> str:
    numbers = {name: value for name, value in measured.items() if isinstance(value, int | float)}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in numbers.items())


def _table(plan: Plan) -> str:
    rows = [
        ("parameters", f"{plan.parameters / 1e6:,.1f} M"),
        ("processes", str(plan.processes)),
        ("steps", f"{plan.steps:,}"),
        ("tokens", f"{plan.tokens / 1e6:,.1f} M"),
        ("weights", format_bytes(plan.weight_bytes)),
        ("gradients", format_bytes(plan.gradient_bytes)),
        ("optimizer", format_bytes(plan.optimizer_bytes)),
        ("average", format_bytes(plan.average_bytes)),
        ("activations (estimate)", format_bytes(plan.activation_bytes)),
        ("memory per process", f"{format_bytes(plan.total_bytes)} of {format_bytes(plan.memory_bytes)}"),
        ("tokens per second", f"{plan.tokens_per_second:,.0f}"),
        ("time", f"{plan.seconds / 3600:,.1f} hours"),
    ]
    lines = [f"{name:24}{value:>24}" for name, value in rows]
    if plan.total_bytes > plan.memory_bytes:
        lines.append(
            "It does not fit: raise parallel.shard or pipeline, lower train.micro_batch_tokens or checkpoint gradients."
        )
    return "\n".join(lines)
