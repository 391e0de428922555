"""Where benchmarks look for real data, and the options of those that replay a trace or read a text."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any


def shared_folder() -> Path:
    """$FASTSERVE_SHARED, or the folder `shared` beside the repository; it need not be there."""
    return Path(os.environ.get("FASTSERVE_SHARED") or Path(__file__).resolve().parents[2] / "shared")


def add_trace_options(parser: argparse.ArgumentParser, context: int) -> None:
    """Which requests of which trace, at which load, scaled to which context."""
    parser.add_argument("--trace", type=Path, default=shared_folder() / "data/traces/azure_llm_2023_conv.csv")
    parser.add_argument("--load", type=float, default=0.9)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--offset", type=int, default=0)
    parser.add_argument("--context", type=int, default=context)


def add_text_options(parser: argparse.ArgumentParser, tokens: int, second: str, second_file: str) -> None:
    """A model, the text that it is judged on, and a second one, `--{second}`: what it is calibrated or trained on."""
    corpora = shared_folder() / "data/corpora"
    parser.add_argument("--model", default="", help="a Llama-like folder; the built-in model when left out")
    parser.add_argument("--text", type=Path, default=corpora / "stories_val.txt", help="what the result is judged on")
    parser.add_argument(f"--{second}", type=Path, default=corpora / second_file)
    parser.add_argument("--tokens", type=int, default=tokens, help="of the text that is scored")


def text_settings(arguments: argparse.Namespace, second: str) -> dict[str, Any]:
    """The arguments as JSON has them; ends the script if one of the two texts is not there."""
    for name in ("text", second):
        if not getattr(arguments, name).is_file():
            sys.exit(f"there is no {getattr(arguments, name)}; give --text and --{second}, or set FASTSERVE_SHARED")
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
