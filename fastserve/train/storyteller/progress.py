"""Tell how a stage goes: a live bar on a terminal, one JSON line per report elsewhere."""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class StageProgress:
    """Use as a context manager around a stage of `num_steps` steps."""

    def __init__(self, stage: str, num_steps: int) -> None:
        self._stage = stage
        self._started = time.monotonic()
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            self._bar = Progress(
                TextColumn(stage), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
            )
            self._task = self._bar.add_task("", total=num_steps)

    def __enter__(self) -> StageProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def report(self, step: int, **values: float | int | str) -> None:
        """Show the values of a step; numbers are rounded for reading."""
        rounded = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in values.items()}
        if self._bar:
            self._bar.update(
                self._task, completed=step, description=" ".join(f"{key} {value}" for key, value in rounded.items())
            )
            return
        seconds = round(time.monotonic() - self._started, 1)
        sys.stdout.write(json.dumps({"stage": self._stage, "step": step, "seconds": seconds, **rounded}) + "\n")
        sys.stdout.flush()
