"""What tells how a run goes: a live line on a terminal, log.jsonl, TensorBoard and Weights & Biases if wished."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from fastserve.core.errors import ConfigError


class Watch(Protocol):
    """Receives what the loop measures."""

    def report(self, step: int, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Silence:
    """For all processes but the first."""

    def report(self, step: int, values: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class RunWatch:
    """Writes every report to RUN/log.jsonl and to the sinks that were asked for."""

    def __init__(self, folder: Path, stage: str, num_steps: int, *, tensorboard: bool = False, wandb: str = "") -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._stage, self._started, self._num_steps = stage, time.monotonic(), num_steps
        self._log = open(folder / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        console = Console(stderr=True)
        columns = (TextColumn(stage), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(
            *columns, TextColumn("{task.description}"), console=console, disable=not console.is_terminal
        )
        self._task = self._bar.add_task("", total=num_steps)
        self._bar.start()
        self._board = _tensorboard(folder) if tensorboard else None
        self._run = _wandb(wandb, folder) if wandb else None

    def report(self, step: int, values: dict[str, Any]) -> None:
        """One line of the log; numbers are shown rounded on the terminal."""
        seconds = round(time.monotonic() - self._started, 2)
        line = json.dumps({"stage": self._stage, "step": step, "seconds": seconds, **values}, ensure_ascii=False)
        self._log.write(line + "\n")
        self._log.flush()
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        shown = " ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items())
        self._bar.update(self._task, completed=step, description=shown)
        if self._bar.disable:
            sys.stderr.write(f"{self._stage} {step}/{self._num_steps}: {shown}\n")
        for name, value in numbers.items():
            if self._board:
                self._board.add_scalar(f"{self._stage}/{name}", value, step)
        if self._run:
            self._run.log(numbers, step=step)

    def close(self) -> None:
        self._bar.stop()
        self._log.close()
        if self._board:
            self._board.close()
        if self._run:
            self._run.finish()


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError(
            "watch.tensorboard needs the package tensorboard: pip install 'fastserve[train]', or set it to false"
        ) from None
    return SummaryWriter(str(folder / "tensorboard"))


def _wandb(project: str, folder: Path) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError("watch.wandb_project needs the package wandb: pip install wandb, or leave it out") from None
    return wandb.init(project=project, dir=str(folder), name=folder.name)
