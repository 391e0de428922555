"""Sequences whose blocks are on their way from a lower tier to the device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fastserve.scheduler.sequence import Sequence


@dataclass(slots=True)
class Load:
    """Blocks `block_ids[first:]` of `sequence`; `coming` have not arrived, `bad` could not be read."""

    sequence: Sequence
    first: int
    coming: set[int]
    bad: set[int] = field(default_factory=set)

    @property
    def num_good(self) -> int:
        """Leading blocks of the sequence that hold what they should."""
        blocks = self.sequence.block_ids
        return next((index for index, block_id in enumerate(blocks) if block_id in self.bad), len(blocks))


class Loads:
    """All loads in flight, found by block."""

    def __init__(self) -> None:
        self._by_block: dict[int, Load] = {}
        self._live: dict[float, Load] = {}

    def __len__(self) -> int:
        return len(self._live)

    @property
    def num_blocks(self) -> int:
        """Blocks that have not arrived."""
        return len(self._by_block)

    def sequences(self) -> Iterable[Sequence]:
        """Whose they are, aborted ones included."""
        return (load.sequence for load in self._live.values())

    def begin(self, sequence: Sequence, first: int) -> None:
        """The sequence's blocks from index `first` on were asked for."""
        load = Load(sequence, first, set(sequence.block_ids[first:]))
        self._live[sequence.arrival_order] = load
        for block_id in load.coming:
            self._by_block[block_id] = load

    def find(self, block_id: int) -> Load:
        return self._by_block[block_id]

    def arrive(self, block_id: int, is_good: bool) -> Load | None:
        """A block arrived; returns its load when it was the last."""
        load = self._by_block.pop(block_id)
        load.coming.discard(block_id)
        if not is_good:
            load.bad.add(block_id)
        if load.coming:
            return None
        del self._live[load.sequence.arrival_order]
        return load
