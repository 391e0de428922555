"""Guess the tokens that come next, so that one step can verify several: look the last ones up in what was there before.

Prompt look-up (Saxena, 2023): where the last few tokens occurred earlier in prompt or answer, what followed then is the
guess. The index also knows how often it would have been right, whether or not its guesses were used, so that `auto`
spends tokens of a step only where they are expected to pay. Guesses never change what is sampled. Integers only.
"""

from __future__ import annotations

from collections.abc import Sequence as Ids
from typing import Protocol

from fastserve.scheduler.cost import CostModel
from fastserve.scheduler.sequence import Sequence

MAX_DRAFTS = 8
_SIZES = (4, 2)  # lengths of the ends that are looked up, the surest first
_PRIOR, GUESS_PRIOR = 0.4, 0.6  # chance that a guess is right, before anything is known: looked up, or a model's
GUESS_RATE = 0.15  # weight of the newest token in that chance
_MARGIN = 1.25  # a guess must be worth this many times what it costs


class Drafter(Protocol):
    """Makes guesses for sequences that decode."""

    def propose(self, sequence: Sequence, limit: int, num_sequences: int) -> list[int]:
        """At most `limit` tokens that may follow; `num_sequences` are in the step."""
        ...

    def forget(self, request_id: str) -> None:
        """The sequence has ended."""
        ...


class NgramDrafter:
    """Prompt look-up.

    Args:
        cost: how long steps take; None proposes whatever is found, as often as it is found.
        max_drafts: most tokens of one guess.
    """

    def __init__(self, cost: CostModel | None = None, max_drafts: int = MAX_DRAFTS) -> None:
        self._cost = cost
        self._max_drafts = max_drafts
        self._indexes: dict[str, _Index] = {}

    def propose(self, sequence: Sequence, limit: int, num_sequences: int) -> list[int]:
        index = self._indexes.get(sequence.request_id)
        if index is None:
            index = self._indexes[sequence.request_id] = _Index(sequence.num_prompt)
        index.extend(sequence.token_ids)
        limit = min(limit, self._max_drafts)
        if limit <= 0:
            return []
        size, start = index.find(sequence.token_ids)
        if start < 0:
            return []
        if self._cost is not None:
            chance, context = index.chances[size], len(sequence.token_ids)
            limit = num_worthwhile(self._cost, chance, context, num_sequences, limit)
        return _follow(sequence.token_ids, start, limit)

    def forget(self, request_id: str) -> None:
        self._indexes.pop(request_id, None)


def num_worthwhile(
    cost: CostModel, chance: float, context: int, num_sequences: int, limit: int, seconds: float = 0.0
) -> int:
    """How many guesses pay, of at most `limit`: the j-th is right with chance^j, and then saves a token's share of a
    step; it costs `seconds` to make, and a token more in the step that verifies it."""
    each = cost.coefficients
    worth = each.step / max(num_sequences, 1) + each.decode + each.decode_context * context
    price = _MARGIN * (cost.prefill_seconds(1, context) + seconds)
    count, expected = 0, chance
    while count < limit and expected * worth > price:
        count += 1
        expected *= chance
    return count


class _Index:
    """Where each short run of tokens occurred last, and how well that tells what follows."""

    def __init__(self, num_prompt: int) -> None:
        self.chances = dict.fromkeys(_SIZES, _PRIOR)
        self._num_prompt = num_prompt
        self._num_indexed = 0
        # run of tokens -> position of the token that followed it last
        self._next: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in _SIZES}

    def extend(self, token_ids: Ids[int]) -> None:
        """Take in the tokens from where it stopped; each token of the answer also tests the guess for it."""
        for size, table in self._next.items():
            for position in range(max(size, self._num_indexed), len(token_ids)):
                run = tuple(token_ids[position - size : position])
                if position >= self._num_prompt and run in table:
                    was_right = token_ids[table[run]] == token_ids[position]
                    self.chances[size] += GUESS_RATE * (was_right - self.chances[size])
                table[run] = position
        self._num_indexed = len(token_ids)

    def find(self, token_ids: Ids[int]) -> tuple[int, int]:
        """(length of the run, position of what followed it), or (0, -1)."""
        for size, table in self._next.items():
            position = table.get(tuple(token_ids[-size:]))
            if position is not None:
                return size, position
        return 0, -1


def _follow(token_ids: Ids[int], start: int, count: int) -> list[int]:
    """`count` tokens from `start`; past the end it goes on with its own first ones, as a repetition does."""
    found = list(token_ids[start : start + count])
    period = len(found)
    while len(found) < count:
        found.append(found[-period])
    return found
