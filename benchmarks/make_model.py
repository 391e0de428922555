"""Make a model folder of a known shape with seeded random weights.

    python benchmarks/make_model.py qwen3-0.6b                  # into the user's cache; prints the folder
    python benchmarks/make_model.py llama-8b /data/llama-8b     # 16 GB, written with about 2 GB of memory
    python benchmarks/make_model.py qwen3-0.6b --weights int4 --head int8

--weights quantises the linears of the layers, rounded to nearest (see `fastserve/bench/quantized_model.py`); the
embedding and the output projection stay bfloat16 unless --head int8 (tied: one 8-bit matrix serves both).
Shapes: qwen3-0.6b, llama-0.1b, llama-8b, bert-base, t5-base, marian, bart-base.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fastserve.bench import quantized_model, random_model, shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=shapes.names())
    parser.add_argument("folder", type=Path, nargs="?", help="a new folder; the user's cache when left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", default="", help=f"quantise: {quantized_model.SCHEMES}")
    parser.add_argument(
        "--head", choices=("", "int8", "int8-a8"), default="", help="the output projection of a quantised model"
    )
    arguments = parser.parse_args()
    if arguments.head and not arguments.weights:
        parser.error("--head needs --weights")
    print(
        random_model.make(arguments.shape, arguments.folder, arguments.seed)
        if not arguments.weights
        else random_model.make_quantized(
            arguments.shape, arguments.weights, arguments.head, arguments.folder, arguments.seed
        )
    )


if __name__ == "__main__":
    main()
