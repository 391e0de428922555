"""Hashes of words, of word sequences and of documents, all in numpy: no loop over words.

A word is a run of letters and digits, in lower case; a Chinese or Japanese character is a word by itself. Case,
punctuation and spacing therefore change no hash. Signatures are MinHash (Broder 1997, "On the resemblance and
containment of documents"): the share of equal entries estimates the share of common word sequences.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
SIGNATURE_LENGTH = 120
SHINGLE_WORDS = 3
_BLOCK = 2048  # shingles at a time: the table of products stays in the cache
_SEPARATOR, _LETTER, _IDEOGRAPH = 0, 1, 2
_NUM_CODES = 0x323B0  # no letter has a higher code
_ODD = np.uint64(0x9E3779B97F4A7C15)
_ODD_2 = np.uint64(0xBF58476D1CE4E5B9)


def word_hashes(text: str) -> Hashes:
    """[W] one hash per word, in order."""
    codes = np.frombuffer(text.lower().encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
    kinds = _kinds()[np.minimum(codes, _NUM_CODES)]
    is_start = kinds == _IDEOGRAPH
    is_start[1:] |= (kinds[1:] == _LETTER) & (kinds[:-1] != _LETTER)
    is_start[:1] |= kinds[:1] == _LETTER
    in_word = kinds != _SEPARATOR
    codes, starts = codes[in_word], np.flatnonzero(is_start[in_word])
    if not len(starts):
        return np.empty(0, dtype=np.uint64)
    lengths = np.diff(np.append(starts, len(codes)))
    positions = np.arange(len(codes)) - np.repeat(starts, lengths)
    letters = _mixed(codes.astype(np.uint64) * _ODD + positions.astype(np.uint64) * _ODD_2)
    return _mixed(np.add.reduceat(letters, starts))


def sequence_hashes(words: Hashes, length: int) -> Hashes:
    """[W - length + 1] one hash per sequence of `length` words; a shorter text has the one of all its words."""
    if not len(words):
        return words
    length = min(length, len(words))
    num_sequences = len(words) - length + 1
    total = np.zeros(num_sequences, dtype=np.uint64)
    for offset in range(length):
        total = total * _ODD_2 + words[offset : offset + num_sequences]
    return _mixed(total)


def document_hash(words: Hashes) -> np.uint64:
    """One hash of all words in order."""
    positions = np.arange(1, len(words) + 1, dtype=np.uint64)
    return np.uint64(_mixed(words ^ (positions * _ODD_2)).sum(dtype=np.uint64))


def signature(words: Hashes) -> NDArray[np.uint32]:
    """[SIGNATURE_LENGTH] MinHash of the sequences of SHINGLE_WORDS words."""
    shingles = sequence_hashes(words, SHINGLE_WORDS)
    smallest = np.full(SIGNATURE_LENGTH, np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(shingles), _BLOCK):
        products = _multipliers()[:, None] * shingles[None, start : start + _BLOCK]  # [SIGNATURE_LENGTH, block]
        np.minimum(smallest, products.min(axis=1), out=smallest)
    return (smallest >> np.uint64(32)).astype(np.uint32)


def _mixed(values: Hashes) -> Hashes:
    """Spread every bit over all others (two rounds of multiply and shift)."""
    values = (values ^ (values >> np.uint64(31))) * _ODD
    values = (values ^ (values >> np.uint64(29))) * _ODD_2
    return values ^ (values >> np.uint64(32))


@functools.cache
def _multipliers() -> Hashes:
    return np.random.default_rng(20261121).integers(1 << 63, size=SIGNATURE_LENGTH, dtype=np.uint64) * np.uint64(
        2
    ) + np.uint64(1)


@functools.cache
def _kinds() -> NDArray[np.uint8]:
    """For every code point up to _NUM_CODES, which stands for all behind: separator, letter or digit, ideograph."""
    kinds = np.fromiter((chr(code).isalnum() for code in range(_NUM_CODES + 1)), dtype=np.uint8, count=_NUM_CODES + 1)
    for first, last in ((0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF)):
        kinds[first : last + 1] *= _IDEOGRAPH
    return kinds
