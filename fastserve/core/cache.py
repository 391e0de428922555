"""Where files are kept that can be made again: converted models, benchmark models, environments of peers."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/fastserve`, else `~/.cache/fastserve`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "fastserve"
