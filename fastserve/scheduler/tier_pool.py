"""Which KV blocks are kept below the device, in host memory or in a file. Integers only; the bytes are in the engine.

The tiers are a cache by content. A full block that is about to be overwritten on the device is kept here under its
prefix hash, and read back when a prompt or a preempted sequence needs that prefix: a chat that returns and a sequence
that lost its memory are the same case. Nothing relies on an entry: when one is gone, or cannot be read, its tokens are
computed again. In `moves`, device blocks are their ids (0 and up) and slots of the tiers are negative: ~slot.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

REPLACEMENTS = ("lru", "lfu")
_FADE = 0.05  # of an old measurement, at each new one


@dataclass(slots=True)
class Tier:
    """One tier; the first is the fastest. `seconds_per_block` is the time to bring a block back, learned as it runs."""

    num_slots: int
    seconds_per_block: float = 0.0


@dataclass(slots=True, eq=False)
class _Entry:
    level: int
    slot: int
    uses: int = 0
    last_use: int = 0


@dataclass(slots=True)
class _Level:
    tier: Tier
    free: list[int]
    order: list[tuple[int, int, bytes]] = field(default_factory=list)  # heap: the first goes next; some are outdated


class TierPool:
    """Slots of all tiers and what they hold.

    Args:
        tiers: the fastest first. What a full tier gives up moves to the next one, what the last gives up is gone.
        replacement: "lru", or "lfu" (ties: least recent first).

    Attributes:
        first: the fastest tier.
        moves: (source, target) since the last plan, in the order in which they must be carried out.
    """

    def __init__(self, tiers: SequenceOf[Tier], replacement: str = "lru") -> None:
        assert tiers and all(tier.num_slots > 0 for tier in tiers) and replacement in REPLACEMENTS
        self.moves: list[tuple[int, int]] = []
        self.first = tiers[0]
        self.num_kept = 0
        self.num_restored = 0
        self.num_failed = 0
        self._by_frequency = replacement == "lfu"
        self._clock = 0
        self._entries: dict[bytes, _Entry] = {}
        self._levels: list[_Level] = []
        first = 0
        for tier in tiers:
            self._levels.append(_Level(tier, list(range(first, first + tier.num_slots))[::-1]))
            first += tier.num_slots

    def __len__(self) -> int:
        return len(self._entries)

    def keep(self, block_id: int, block_hash: bytes) -> None:
        """Copy a device block that is about to be overwritten, unless its content is here already."""
        if block_hash in self._entries:
            return
        entry = self._entries[block_hash] = _Entry(0, self._take_slot(0))
        self._touch(block_hash, entry)
        self.moves.append((block_id, ~entry.slot))
        self.num_kept += 1

    def count(self, hashes: SequenceOf[bytes]) -> int:
        """How many leading `hashes` are here."""
        for index, block_hash in enumerate(hashes):
            if block_hash not in self._entries:
                return index
        return len(hashes)

    def seconds(self, hashes: SequenceOf[bytes]) -> float:
        """Time to bring these back; all must be here."""
        return sum(self._levels[self._entries[block_hash].level].tier.seconds_per_block for block_hash in hashes)

    def restore(self, block_hash: bytes, block_id: int) -> None:
        """Copy a block that is here to the device. The entry stays."""
        entry = self._entries[block_hash]
        self._touch(block_hash, entry)
        self.moves.append((~entry.slot, block_id))

    def restored(self, block_hash: bytes, is_good: bool, seconds: float) -> None:
        """A read that took `seconds` is over. One that failed is forgotten: its slot may be bad or overwritten."""
        entry = self._entries.get(block_hash)
        if is_good:
            self.num_restored += 1
            if entry is not None:
                tier = self._levels[entry.level].tier
                known = tier.seconds_per_block or seconds
                tier.seconds_per_block = known + _FADE * (min(seconds, 4 * known) - known)
            return
        self.num_failed += 1
        if entry is not None:
            del self._entries[block_hash]
            self._levels[entry.level].free.append(entry.slot)

    def take_moves(self) -> list[tuple[int, int]]:
        """The moves for the next plan."""
        moves, self.moves = self.moves, []
        return moves

    def _take_slot(self, level: int) -> int:
        """A free slot of this level; what it held last goes down one level."""
        own = self._levels[level]
        if own.free:
            return own.free.pop()
        while True:
            _, last_use, block_hash = heapq.heappop(own.order)
            entry = self._entries.get(block_hash)
            if entry is not None and entry.level == level and entry.last_use == last_use:
                break
        slot = entry.slot
        if level + 1 == len(self._levels):
            del self._entries[block_hash]
        else:
            entry.slot = self._take_slot(level + 1)
            entry.level = level + 1
            self._enqueue(block_hash, entry)
            self.moves.append((~slot, ~entry.slot))
        return slot

    def _touch(self, block_hash: bytes, entry: _Entry) -> None:
        self._clock += 1
        entry.uses, entry.last_use = entry.uses + 1, self._clock
        self._enqueue(block_hash, entry)

    def _enqueue(self, block_hash: bytes, entry: _Entry) -> None:
        own = self._levels[entry.level]
        heapq.heappush(own.order, (entry.uses if self._by_frequency else 0, entry.last_use, block_hash))
        if len(own.order) > 2 * own.tier.num_slots + 64:
            own.order = [
                (uses, last_use, name)
                for uses, last_use, name in own.order
                if (kept := self._entries.get(name)) and kept.last_use == last_use and self._levels[kept.level] is own
            ]
            heapq.heapify(own.order)
