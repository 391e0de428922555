"""`python -m fastserve.train.worker RECIPE RUN`: one process of a run that `launch` or torchrun started."""

from __future__ import annotations

import sys
from pathlib import Path

from fastserve.core.errors import FastServeError
from fastserve.train.pretrain import pretrain
from fastserve.train.settings import read_recipe


def main(recipe: Path, run: Path) -> int:
    try:
        pretrain(read_recipe(recipe), run)
    except FastServeError as error:
        sys.stderr.write(f"fastserve: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
