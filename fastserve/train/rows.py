"""Rows of tokens for the network, in an order that follows from the seed and the row's number alone.

Nothing is remembered between steps, so a run that is resumed, or resumed by another number of processes, sees the same
rows. PackedRows lay whole documents end to end; WindowRows cut each document for itself.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fastserve.core.errors import ConfigError
from fastserve.train.data.shards import TokenDataset

Tokens = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Row:
    """`tokens [L]` and, for each, the number of its document within the row and its position in the document.

    `key` tells the row from all others of the run: random choices about it follow from it.
    """

    tokens: Tokens
    documents: Tokens
    positions: Tokens
    key: tuple[int, ...] = ()


class Rows(Protocol):
    """Endless rows by number; every epoch has another order."""

    per_epoch: int

    def row(self, number: int) -> Row: ...


class PackedRows:
    """Documents in shuffled order, opened by `start_ids` and closed by `end_ids`, cut into rows of `length` tokens.

    With `overlap`, a row holds one token more, which is also the first of the next: the target of its last position.
    """

    def __init__(
        self,
        data: TokenDataset,
        length: int,
        seed: int,
        *,
        start_ids: tuple[int, ...],
        end_ids: tuple[int, ...],
        overlap: int,
    ) -> None:
        self._data, self._length, self._seed, self._overlap = data, length, seed, overlap
        self._start, self._end = np.array(start_ids, dtype=np.int64), np.array(end_ids, dtype=np.int64)
        self._sizes = data.lengths + len(start_ids) + len(end_ids)
        self.per_epoch = (int(self._sizes.sum()) - overlap) // length
        if self.per_epoch < 1:
            raise ConfigError(
                f"{data.folder} has too few tokens for one row of {length}; use shorter rows or more text"
            )
        self._epoch = -1
        self._order = self._ends = self._rows = np.zeros(0, dtype=np.int64)

    def row(self, number: int) -> Row:
        epoch, place = divmod(number, self.per_epoch)
        self._begin_epoch(epoch)
        begin = int(self._rows[place]) * self._length
        wanted, index = self._length + self._overlap, int(np.searchsorted(self._ends, begin, side="right"))
        tokens, documents, positions = (np.empty(wanted, dtype=np.int64) for _ in range(3))
        filled = 0
        for document in range(wanted):
            number = int(self._order[index + document])
            size = int(self._sizes[number])
            offset = begin + filled - (int(self._ends[index + document]) - size)
            taken = min(size - offset, wanted - filled)
            place_in_row = slice(filled, filled + taken)
            tokens[place_in_row] = self._slice(number, offset, taken)
            documents[place_in_row] = document
            # A document that began in the row before is counted from the beginning of this one.
            positions[place_in_row] = np.arange(taken)
            filled += taken
            if filled == wanted:
                break
        return Row(tokens, documents, positions)

    def _slice(self, document: int, offset: int, size: int) -> Tokens:
        """Tokens [offset, offset + size) of a document with what opens and closes it."""
        first, length = len(self._start), int(self._data.lengths[document])
        text_start, text_end = max(0, offset - first), min(length, offset + size - first)
        pieces = [self._start[offset : offset + size]]
        if text_end > text_start:
            pieces.append(self._data.document(document, text_start, text_end - text_start))
        pieces.append(self._end[max(0, offset - first - length) : max(0, offset + size - first - length)])
        return np.concatenate(pieces)

    def _begin_epoch(self, epoch: int) -> None:
        if epoch != self._epoch:
            chooser = np.random.default_rng([self._seed, epoch])
            self._order = chooser.permutation(len(self._data))
            self._ends = np.cumsum(self._sizes[self._order])
            self._rows = chooser.permutation(self.per_epoch)
            self._epoch = epoch


class WindowRows:
    """Each document cut into windows of at most `length` tokens; windows shorter than `min_length` are left out."""

    def __init__(self, data: TokenDataset, length: int, seed: int, min_length: int = 8) -> None:
        self._data, self._length, self._seed = data, length, seed
        full, rest = np.divmod(data.lengths, length)
        self._ends = np.cumsum(full + (rest >= min_length))
        self.per_epoch = int(self._ends[-1])
        if self.per_epoch < 1:
            raise ConfigError(f"{data.folder} has no document of {min_length} tokens or more")
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def row(self, number: int) -> Row:
        epoch, place = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self.per_epoch)
            self._epoch = epoch
        window = int(self._order[place])
        document = int(np.searchsorted(self._ends, window, side="right"))
        first = int(self._ends[document - 1]) if document else 0
        tokens = self._data.document(document, (window - first) * self._length, self._length)
        return Row(tokens, np.zeros_like(tokens), np.arange(len(tokens)))


class MixedRows:
    """Rows of several sources in fixed shares.

    Of the rows before number N the first source has its share, rounded up; the rest are shared out among the later
    sources in the same way. So no source loses a row when N grows.
    """

    def __init__(self, sources: list[Rows], weights: list[float]) -> None:
        self._sources = sources
        # Of the rows that source k and the later ones have, how much belongs to the later ones.
        self._later = [math.fsum(weights[k + 1 :]) / math.fsum(weights[k:]) for k in range(len(weights) - 1)]
        self.per_epoch = sum(source.per_epoch for source in sources)

    def rows(self, first: int, number: int) -> list[Row]:
        """Rows [first, first + number) of the mixture, source after source."""
        counts_before, counts_after = self._counts(first), self._counts(first + number)
        return [
            dataclasses.replace(source.row(index), key=(position, index))
            for position, source in enumerate(self._sources)
            for index in range(counts_before[position], counts_after[position])
        ]

    def _counts(self, number: int) -> list[int]:
        """Rows of each source among the first `number`."""
        counts = []
        for share in self._later:
            later = math.floor(number * share)
            counts.append(number - later)
            number = later
        return [*counts, number]
