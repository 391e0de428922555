"""Turn tokens into batches of equal windows, with the same order in every run of the same seed.

A batch is `inputs [B, L]` and `targets [B, L]` (the next token; IGNORED where no loss is taken). Pretraining cuts
shuffled documents, laid end to end, into windows and draws them from several sources by weight; tuning packs whole
conversations. Order is a function of the seed and the step alone, so a stopped run resumes by skipping ahead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastserve.core.errors import ConfigError

IGNORED = -100
_LOOKAHEAD = 64  # conversations looked through to fill a row
Tokens = NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Batch:
    inputs: NDArray[np.int64]  # [B, L]
    targets: NDArray[np.int64]  # [B, L]


class WindowSource:
    """Endless windows of `length` + 1 tokens over shuffled documents; an epoch sees every token once."""

    def __init__(self, documents: list[Tokens], length: int, seed: int, first_epoch: int = 0) -> None:
        if sum(len(document) for document in documents) <= length:
            raise ConfigError(
                f"a training source has fewer than {length + 1} tokens; use a shorter window or more text"
            )
        self._documents = documents
        self._length = length
        self._seed = seed
        self._epoch = first_epoch
        self._windows: Iterator[Tokens] = iter(())

    def take(self) -> Tokens:
        """The next window [L + 1]."""
        window = next(self._windows, None)
        if window is None:
            self._windows = self._new_epoch()
            window = next(self._windows)
        return window

    def _new_epoch(self) -> Iterator[Tokens]:
        order = np.random.default_rng([self._seed, self._epoch])
        self._epoch += 1
        tokens = np.concatenate([self._documents[index] for index in order.permutation(len(self._documents))])
        starts = np.arange(0, len(tokens) - self._length, self._length)
        return (tokens[start : start + self._length + 1] for start in order.permutation(starts))


def mixed_batches(
    documents: dict[str, list[Tokens]], mixture: dict[str, float], batch_tokens: int, length: int, seed: int
) -> Iterator[Batch]:
    """Endless batches of windows drawn from several sources; `mixture` holds relative weights."""
    names = [name for name, weight in mixture.items() if weight > 0]
    sources = [WindowSource(documents[name], length, seed + index) for index, name in enumerate(names)]
    weights = np.array([mixture[name] for name in names])
    chooser = np.random.default_rng(seed)
    while True:
        choices = chooser.choice(len(sources), size=batch_tokens // length, p=weights / weights.sum())
        windows = np.stack([sources[choice].take() for choice in choices]).astype(np.int64)
        yield Batch(windows[:, :-1], windows[:, 1:])


@dataclass(frozen=True, slots=True)
class Conversation:
    """Token ids of one conversation; `is_answer` marks the tokens to learn (answers with their end token)."""

    tokens: Tokens
    is_answer: NDArray[np.bool_]


def pack_conversations(conversations: list[Conversation], batch_tokens: int, length: int, seed: int) -> Iterator[Batch]:
    """One epoch of batches; whole conversations fill each row. Padding and prompts carry no loss."""
    longest = max(len(conversation.tokens) for conversation in conversations)
    if longest > length + 1:
        raise ConfigError(
            f"a conversation has {longest} tokens, a row has {length}; shorten answers or raise tune.length"
        )
    waiting = [conversations[index] for index in np.random.default_rng(seed).permutation(len(conversations))]
    while waiting:
        yield _batch_of_rows([_take_row(waiting, length + 1) for _ in range(batch_tokens // length)], length)


def _take_row(waiting: list[Conversation], room: int) -> list[Conversation]:
    """Remove from the first of `waiting` those that fit in a row together."""
    row = []
    for index, conversation in enumerate(waiting[:_LOOKAHEAD]):
        if len(conversation.tokens) <= room:
            room -= len(conversation.tokens)
            row.append(index)
    return [waiting.pop(index) for index in reversed(row)]


def _batch_of_rows(rows: list[list[Conversation]], length: int) -> Batch:
    tokens = np.zeros((len(rows), length + 1), dtype=np.int64)
    learned = np.zeros((len(rows), length + 1), dtype=bool)
    for row, conversations in enumerate(rows):
        end = 0
        for conversation in conversations:
            start, end = end, end + len(conversation.tokens)
            tokens[row, start:end] = conversation.tokens
            learned[row, start:end] = conversation.is_answer
    return Batch(tokens[:, :-1], np.where(learned[:, 1:], tokens[:, 1:], IGNORED))
