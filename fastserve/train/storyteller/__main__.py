"""`python -m fastserve.train.storyteller RECIPE`: run the stages of a recipe, all or one."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fastserve.core.errors import ConfigError
from fastserve.train.storyteller.recipe import read_recipe
from fastserve.train.storyteller.stages import STAGES, TEXTS, run_stages


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastserve.train.storyteller", description="Train a small language model from a recipe."
    )
    parser.add_argument("recipe", type=Path, help="a TOML file; the built-in model's is configs/builtin.toml")
    parser.add_argument(
        "--stage", choices=(*STAGES, TEXTS), help="run this stage only (default: all that are not done yet)"
    )
    parser.add_argument(
        "--data", type=Path, help="folder that holds corpora/ (default: $FASTSERVE_SHARED/data, else ../shared/data)"
    )
    parser.add_argument("--out", type=Path, help="folder for checkpoints and the exported model/ (default: build/NAME)")
    parser.add_argument(
        "--no-compile", action="store_true", help="do not compile the loss (no C++ compiler, or a very short run)"
    )
    options = parser.parse_args(arguments)
    try:
        recipe = read_recipe(options.recipe)
        data = options.data or Path(os.environ.get("FASTSERVE_SHARED", "../shared")) / "data"
        run_stages(
            recipe, data / "corpora", options.out or Path("build") / recipe.name, options.stage, not options.no_compile
        )
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
