"""Checkpoints of a run: every process writes its part, in the background, and a whole one appears at once.

    RUN/checkpoints/step-00000500/   safetensors of weights, optimizers and average; state.json, written last
Tensors go through torch.distributed.checkpoint, so a run may go on with another number of processes. A checkpoint is
written into `.partial` and renamed when all of it is there: a kill at any moment leaves the one before whole.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve.core.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from fastserve.train.mesh import Mesh

STATE = "state.json"
# What a checkpoint lacks where a key of the recipe was another when it was saved.
_KEYS = {"optimizer.": "optimizer.kind", "average.": "train.ema_decay", "loss_scale": "train.precision"}
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands: steps done, rows left out by rollbacks, counted in steps, and tokens of the steps."""

    step: int = 0
    skipped: int = 0
    tokens: int = 0


class Checkpoints:
    """The checkpoints of one run folder; `keep` of them stay."""

    def __init__(self, folder: Path, mesh: Mesh, keep: int) -> None:
        self._folder, self._mesh, self._keep = folder, mesh, keep
        self._pending: tuple[Path, Position, Future[Any]] | None = None
        self._group: Any = None
        if mesh.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob("*.partial"):
                shutil.rmtree(left)
        mesh.wait()

    def latest(self) -> Path | None:
        """The last whole checkpoint."""
        return latest_checkpoint(self._folder)

    def save(self, tensors: dict[str, torch.Tensor], position: Position) -> None:
        """Begin to save; the tensors are copied before this returns, so training may go on."""
        import torch
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        self.finish()
        target = self._folder / f"step-{position.step:08d}.partial"
        self._mesh.wait()
        writer = HuggingFaceStorageWriter(str(target), save_distributed=True)
        if self._mesh.num_processes > 1 and self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")
        future = async_save(
            tensors, storage_writer=writer, process_group=self._group, no_dist=self._mesh.num_processes == 1
        )
        self._pending = (target, position, future)  # type: ignore[assignment]

    def poll(self) -> None:
        """Put a save in its place if it is complete."""
        if self._pending and self._pending[2].done():
            self._complete()

    def finish(self) -> None:
        """Wait for the save that is under way, on all processes."""
        if self._pending:
            self._complete()
        self._mesh.wait()

    def load(self, path: Path, tensors: dict[str, torch.Tensor]) -> Position:
        """Fill `tensors` in place from a checkpoint of any number of processes. ConfigError if it lacks some."""
        from torch.distributed.checkpoint import state_dict_loader
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

        reader = HuggingFaceStorageReader(str(path))
        if missing := sorted(tensors.keys() - reader.read_metadata().state_dict_metadata.keys()):
            keys = [key for start, key in _KEYS.items() if any(name.startswith(start) for name in missing)]
            raise ConfigError(
                f"{path} has no {missing[0]}: {' and '.join(keys) or 'the network'} was another when it was saved; set "
                "it back, or begin a new run with another --out"
            )
        state_dict_loader.load(tensors, storage_reader=reader, no_dist=self._mesh.num_processes == 1)
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        return Position(**state)

    def _complete(self) -> None:
        assert self._pending is not None
        target, position, future = self._pending
        future.result()
        self._pending = None
        if not self._mesh.is_first:
            return
        # The first process's save ends when it has heard from all others that theirs has.
        (target / STATE).write_text(json.dumps(dataclasses.asdict(position)), encoding="utf-8")
        final = target.with_suffix("")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(target, final)
        for old in whole_checkpoints(self._folder)[: -self._keep]:
            shutil.rmtree(old)


def whole_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and (path / STATE).exists())


def latest_checkpoint(folder: Path) -> Path | None:
    whole = whole_checkpoints(folder)
    return whole[-1] if whole else None
