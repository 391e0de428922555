"""Sequences whose blocks are on their way from a lower tier to the device: when that pays, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fastserve.scheduler.block_pool import BlockPool
from fastserve.scheduler.cost import CostModel
from fastserve.scheduler.sequence import Residency, Sequence, Status


@dataclass(slots=True)
class _Load:
    """Blocks `block_ids[first:]` of `sequence`; `coming` have not arrived, `bad` could not be read."""

    sequence: Sequence
    first: int
    coming: set[int]
    bad: set[int] = field(default_factory=set)


class Loads:
    """All loads in flight, found by block. `cost` tells what computing the blocks anew would take."""

    def __init__(self, pool: BlockPool, cost: CostModel) -> None:
        self._pool = pool
        self._cost = cost
        self._by_block: dict[int, _Load] = {}
        self._live: dict[float, _Load] = {}

    def __len__(self) -> int:
        return len(self._live)

    def sequences(self) -> Iterable[Sequence]:
        """Whose they are, aborted ones included."""
        return (load.sequence for load in self._live.values())

    def begin(self, sequence: Sequence, hashes: list[bytes]) -> bool:
        """Fetch what follows the blocks at hand from the tiers, when that is quicker than computing it."""
        pool, tiers, first = self._pool, self._pool.tiers, len(sequence.block_ids)
        found = tiers.count(hashes[first:]) if tiers is not None else 0
        if tiers is None or found == 0:
            return False
        seconds = tiers.seconds(hashes[first : first + found]) * (1 + len(self._by_block) / found)
        if seconds > self._cost.prefill_seconds(found * pool.block_size, first * pool.block_size):
            return False
        blocks = pool.allocate(found)
        assert blocks is not None
        found = tiers.count(hashes[first : first + found])  # making room may have cost us some
        pool.free(blocks[found:])
        if found == 0:
            return False
        load = self._live[sequence.arrival_order] = _Load(sequence, first, set(blocks[:found]))
        for block_hash, block_id in zip(hashes[first:], blocks[:found], strict=False):
            tiers.restore(block_hash, block_id)
            self._by_block[block_id] = load
        sequence.block_ids.extend(blocks[:found])
        sequence.residency = Residency.LOADING
        return True

    def arrive(self, block_id: int, is_good: bool, seconds: float) -> Sequence | None:
        """A block came. Returns its sequence when it was the last; that may go on, from the first bad block."""
        load, pool = self._by_block.pop(block_id), self._pool
        sequence, blocks, hashes = load.sequence, load.sequence.block_ids, load.sequence.block_hashes
        assert pool.tiers is not None
        pool.tiers.restored(hashes[blocks.index(block_id)], is_good, seconds)
        load.coming.discard(block_id)
        if not is_good:
            load.bad.add(block_id)
        if load.coming:
            return None
        del self._live[sequence.arrival_order]
        if sequence.status is Status.FINISHED:
            pool.free(blocks)
            sequence.block_ids, sequence.residency = [], Residency.NONE
            return None
        num_good = next((index for index, block_id in enumerate(blocks) if block_id in load.bad), len(blocks))
        pool.free(blocks[num_good:])
        del blocks[num_good:]
        for index in range(load.first, num_good):
            pool.publish(blocks[index], hashes[index])
        return sequence
