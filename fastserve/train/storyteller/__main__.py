"""`python -m fastserve.train.storyteller texts|finish RECIPE --out OUT`: the first and the last step of the recipe.

examples/builtin_model.sh has both, with the commands between them.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from fastserve.core.errors import FastServeError
from fastserve.train.storyteller.finish import finish
from fastserve.train.storyteller.recipe import read_recipe
from fastserve.train.storyteller.texts import write_texts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastserve.train.storyteller", description="The built-in model's texts, scores and card."
    )
    parser.add_argument(
        "step", choices=("texts", "finish"), help="texts and chats of the raw books; or scores and card of the result"
    )
    parser.add_argument("recipe", type=Path, help="configs/builtin_texts.toml, or one like it")
    parser.add_argument("--out", type=Path, required=True, help="folder that holds all of the recipe's results")
    parser.add_argument(
        "--data", type=Path, help="folder that holds corpora/ (default: $FASTSERVE_SHARED/data, else ../shared/data)"
    )
    options = parser.parse_args(arguments)
    try:
        recipe = read_recipe(options.recipe)
        if options.step == "texts":
            data = options.data or Path(os.environ.get("FASTSERVE_SHARED", "../shared")) / "data"
            write_texts(recipe, data / "corpora", options.out)
        else:
            finish(recipe, options.out)
    except FastServeError as error:
        sys.stderr.write(f"fastserve: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
