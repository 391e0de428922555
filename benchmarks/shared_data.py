"""Where benchmarks look for real data, and the options of those that replay a trace."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


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
