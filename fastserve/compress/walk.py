"""Walk through a network block by block with many batches at once, as calibration needs it.

The network's own forward decides what every block is given: masks, positions, T5's shared bias, an encoder's output.
Each batch runs it in a thread of its own that stops at every block; when all wait at the same block, the caller fills
it with weights, looks at what goes in, changes it, and lets the batches go on with what then comes out. Only one thread
runs at any moment, so nothing depends on timing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from fastserve.compress.network import Network
from fastserve.core.errors import CheckpointError


class _Ended(BaseException):
    """Raised in a batch's thread when nobody waits for its outputs."""


@dataclass(frozen=True, slots=True)
class Visit:
    """All batches at one block.

    Attributes:
        block, module: its name and the block itself, filled with weights.
        inputs: per batch the block's arguments.
    """

    block: str
    module: nn.Module
    inputs: list[tuple[tuple[Any, ...], dict[str, Any]]]

    def outputs(self) -> Iterator[Any]:
        """What the block, as it is now, makes of each batch."""
        for args, kwargs in self.inputs:
            with torch.no_grad():
                yield self.module(*args, **kwargs)

    def take_outputs(self) -> Iterator[Any]:
        """The same, and each batch's inputs are let go of when they were used."""
        while self.inputs:
            args, kwargs = self.inputs.pop(0)
            with torch.no_grad():
                output = self.module(*args, **kwargs)
            del args, kwargs
            yield output


class _Batch:
    """One batch's forward, stopped at the block that it reached."""

    def __init__(self, run: Callable[[], object]) -> None:
        self._at: SimpleQueue[Any] = SimpleQueue()
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._main, args=(run,), daemon=True)

    def start(self) -> Any:
        """(block, args, kwargs) of the first block."""
        self._thread.start()
        return self._wait()

    def go_on(self, output: Any) -> Any:
        """The same of the next block, or None at the end."""
        self._answers.put(output)
        return self._wait()

    def end(self) -> None:
        if self._thread.is_alive():
            self._answers.put(_Ended())
            self._thread.join()

    def visit(self, block: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called by a block in this batch's thread."""
        self._at.put((block, args, kwargs))
        answer = self._answers.get()
        if isinstance(answer, _Ended):
            raise answer
        return answer

    def _wait(self) -> Any:
        found = self._at.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def _main(self, run: Callable[[], object]) -> None:
        _current.batch = self
        try:
            with torch.no_grad():
                run()
            self._at.put(None)
        except _Ended:
            pass
        except BaseException as error:
            self._at.put(error)


_current = threading.local()  # .batch: whose thread this is


def walk(network: Network, batches: list[Mapping[str, Tensor]]) -> Iterator[Visit]:
    """Visit the blocks in the order in which the network's forward reaches them.

    What lies outside of all blocks is filled as far as the blocks need it until the walk ends, a block's own parameters
    before its visit and dropped after it. What the caller leaves in the block decides what the next blocks are given.
    """
    network.fill_for_blocks()
    runs = [_Batch(lambda inputs=inputs: network.model(**inputs)) for inputs in batches]  # type: ignore[misc]
    try:
        for name in network.blocks:
            network.block(name).forward = _stopping(name)
        waiting = [run.start() for run in runs]
        for number in range(1, len(network.blocks) + 1):
            name = waiting[0][0]
            assert all(item is not None and item[0] == name for item in waiting), "batches take different ways"
            block = network.block(name)
            del block.forward
            network.fill(name)
            visit = Visit(name, block, [(args, kwargs) for _, args, kwargs in waiting])
            waiting.clear()
            yield visit
            if number < len(network.blocks):
                for run, output in zip(runs, visit.take_outputs(), strict=True):
                    block.forward = _shared(name)
                    waiting.append(run.go_on(output))
                    del block.forward
                block.forward = _shared(name)
            network.drop(name)
    finally:
        for run in runs:
            run.end()
        for name in network.blocks:
            vars(network.block(name)).pop("forward", None)
        network.drop("")


def _stopping(name: str) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return _current.batch.visit(name, args, kwargs)

    return forward


def _shared(name: str) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise CheckpointError(
            f"{name} is used more than once in a pass; networks that share layers can only be compressed by methods "
            "that need no calibration, such as rtn"
        )

    return forward
