"""Which documents say again what an earlier one said: equal hashes, and near-duplicates by MinHash and banding.

Signatures are cut into bands; documents that agree in a whole band are compared by their signatures, and those similar
enough are joined into groups. The first document of a group stays. Signatures stay on disk (a memory map): memory is a
few numbers per document.

Source: Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastserve.train.data.hashing import SIGNATURE_LENGTH, Hashes

BAND_ROWS = 5  # 24 bands: a pair with similarity 0.7 is compared with probability 0.988, one with 0.3 with 0.06
_MAX_ROUNDS = 16  # representatives tried within a bucket
_BLOCK = 1 << 16  # pairs compared at a time


def exact_duplicates(hashes: Hashes) -> NDArray[np.int64]:
    """[N] for each document the index of the first one with the same hash, its own if there is none before."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return first[inverse].astype(np.int64)


def near_duplicates(
    signatures: NDArray[np.uint32], candidates: NDArray[np.int64], similarity: float
) -> NDArray[np.int64]:
    """[N] for each document the first of its group, by index; only `candidates` (sorted) are compared.

    Args:
        signatures: [N, SIGNATURE_LENGTH], may be a memory map.
        candidates: indices of the documents still in.
        similarity: share of equal entries from which two documents are the same.
    """
    groups = _Groups(len(signatures))
    for band in range(0, SIGNATURE_LENGTH, BAND_ROWS):
        keys = _band_keys(signatures, candidates, band)
        order = np.argsort(keys, kind="stable")
        members, keys = candidates[order], keys[order]
        for _ in range(_MAX_ROUNDS):
            if not len(keys):
                break
            is_first = np.append(True, keys[1:] != keys[:-1])
            leaders = members[np.flatnonzero(is_first)[np.cumsum(is_first) - 1]]
            rest = ~is_first
            same = _are_similar(signatures, leaders[rest], members[rest], similarity)
            groups.join(leaders[rest][same], members[rest][same])
            members, keys = members[rest][~same], keys[rest][~same]
    return groups.firsts()


def _band_keys(signatures: NDArray[np.uint32], candidates: NDArray[np.int64], band: int) -> Hashes:
    """[C] one number per candidate for the rows of a band."""
    keys = np.zeros(len(candidates), dtype=np.uint64)
    for start in range(0, len(candidates), _BLOCK):
        rows = np.asarray(signatures[candidates[start : start + _BLOCK], band : band + BAND_ROWS], dtype=np.uint64)
        for column in range(BAND_ROWS):
            block = keys[start : start + _BLOCK]
            keys[start : start + _BLOCK] = (block ^ (block >> np.uint64(29))) * np.uint64(0x9E3779B97F4A7C15) + rows[
                :, column
            ]
    return keys


def _are_similar(
    signatures: NDArray[np.uint32], left: NDArray[np.int64], right: NDArray[np.int64], similarity: float
) -> NDArray[np.bool_]:
    result = np.empty(len(left), dtype=bool)
    for start in range(0, len(left), _BLOCK):
        block = slice(start, start + _BLOCK)
        result[block] = (signatures[left[block]] == signatures[right[block]]).mean(axis=1) >= similarity
    return result


class _Groups:
    """Disjoint sets of indices; the smallest of a set stands for it."""

    def __init__(self, size: int) -> None:
        self._parent = np.arange(size, dtype=np.int64)

    def join(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> None:
        for one, other in zip(left.tolist(), right.tolist(), strict=True):
            first, second = self._find(one), self._find(other)
            self._parent[max(first, second)] = min(first, second)

    def firsts(self) -> NDArray[np.int64]:
        while not np.array_equal(parents := self._parent[self._parent], self._parent):
            self._parent = parents
        return self._parent

    def _find(self, index: int) -> int:
        while (parent := int(self._parent[index])) != index:
            self._parent[index] = self._parent[parent]
            index = int(self._parent[index])
        return index
