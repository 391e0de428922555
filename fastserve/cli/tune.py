"""`fastserve tune`: search good values for a recipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def tune(
    recipe: Annotated[Path, typer.Argument(help="TOML file with a [search] table.")],
    out: Annotated[Path, typer.Option(help="Folder of the search; the same again goes on with it.")],
    trials: Annotated[int, typer.Option(help="Runs in all.", min=1)] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Search the values that a recipe's [search] table names; bad trials end early.

    "optimizer.learning_rate" = { low = 1e-4, high = 1e-2, log = true } is a line of that table, or { choices = [...] }.
    """
    from fastserve.train.settings import read_recipe
    from fastserve.train.tune import tune as search

    best = search(read_recipe(recipe), out, trials)
    if as_json:
        print(json.dumps(best))
        return
    print(f"held-out loss {best['held_out_loss']:.5g} after {best['trials']} trials ({best['pruned']} ended early)")
    for key, value in best["values"].items():
        print(f"  {key} = {json.dumps(value)}")
    print(f"model: {best['model']}", file=sys.stderr)
