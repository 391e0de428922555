"""The thoughts of a model that thinks aloud, told apart from its answer: <think> ... </think>, while it streams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer that may be sent now.

    Attributes:
        kind: content, reasoning, call (`text` is the name of a tool) or arguments (`text` is a part of their JSON).
        index: which call, from 0.
    """

    kind: Literal["content", "reasoning", "call", "arguments"]
    text: str
    index: int = 0


def held_back(text: str, mark: str) -> int:
    """How many characters at the end of `text` may be the beginning of `mark`."""
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-length:]):
            return length
    return 0


class ReasoningSplitter:
    """Splits one answer.

    Args:
        begins_inside: the prompt has opened the thoughts already.
    """

    def __init__(self, begins_inside: bool) -> None:
        self._state = "inside" if begins_inside else "start"
        self._held = ""
        self._has_thought = False

    def push(self, text: str, finished: bool) -> list[Piece]:
        """New text in, what is decided out; everything when `finished`."""
        self._held += text
        pieces: list[Piece] = []
        if self._state == "start":
            self._open(finished)
        if self._state == "inside":
            pieces += self._think(finished)
        if self._state == "gap":
            # White space between thoughts and answer belongs to neither.
            self._held = self._held.lstrip()
            if self._held:
                self._state = "after"
        if self._state == "after" and self._held:
            pieces.append(Piece("content", self._held))
            self._held = ""
        return pieces

    def _open(self, finished: bool) -> None:
        begun = self._held.lstrip()
        if begun.startswith(OPEN):
            self._state, self._held = "inside", begun[len(OPEN) :]
        elif finished or not OPEN.startswith(begun):
            self._state = "after"

    def _think(self, finished: bool) -> list[Piece]:
        if not self._has_thought:
            self._held = self._held.lstrip()
        thought, mark, rest = self._held.partition(CLOSE)
        if mark:
            self._state, self._held = "gap", rest
            thought = thought.rstrip()
        else:
            shown = thought if finished else thought[: len(thought) - held_back(thought, CLOSE)].rstrip()
            thought, self._held = shown, thought[len(shown) :]
        self._has_thought = self._has_thought or bool(thought)
        return [Piece("reasoning", thought)] if thought else []
