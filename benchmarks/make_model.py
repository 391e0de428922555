"""Make a model folder of a known shape with seeded random weights.

    python benchmarks/make_model.py qwen3-0.6b                  # into the user's cache; prints the folder
    python benchmarks/make_model.py llama-8b /data/llama-8b     # 16 GB, written with about 2 GB of memory

Shapes: qwen3-0.6b, llama-0.1b, llama-8b, bert-base, t5-base, marian, bart-base.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastserve.bench import random_model, shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=shapes.names())
    parser.add_argument("folder", type=Path, nargs="?", help="a new folder; the user's cache when left out")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(random_model.make(arguments.shape, arguments.folder, arguments.seed))


if __name__ == "__main__":
    main()
