"""`python -m fastserve.train.worker RECIPE RUN`: one process of a run that `launch` or torchrun started.

A recipe is pretraining's TOML file, or the finetune.json that `fastserve finetune` leaves in its run.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

from fastserve.core.errors import FastServeError


def work(recipe: Path, run: Path) -> None:
    """Do this process's share of a run."""
    if recipe.suffix == ".json":
        from fastserve.train.finetune.run import finetune
        from fastserve.train.finetune.settings import FinetuneSettings
        from fastserve.train.recipe import build_section

        values = json.loads(recipe.read_text(encoding="utf-8"))
        settings = build_section(FinetuneSettings, values["settings"], "")
        finetune(values["task"], values["model"], Path(values["data"]), run, settings)
    else:
        from fastserve.train.pretrain import pretrain
        from fastserve.train.settings import read_recipe

        pretrain(read_recipe(recipe), run)


def main(recipe: Path, run: Path) -> int:
    try:
        work(recipe, run)
    except FastServeError as error:
        sys.stderr.write(f"fastserve: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
