"""Tool calls in a model's answer, found while it streams: the name as soon as it is known, arguments as they come.

Four forms of the hub: Hermes and Qwen (<tool_call>{...}</tool_call>), Llama 3 (a bare object, or after <|python_tag|>),
Mistral ([TOOL_CALLS] and a list, or name[ARGS]{...}), and bare JSON. Text that only looks like a call is given out as
text after all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from fastserve.serve.reasoning import Piece, held_back


@dataclass(frozen=True, slots=True)
class ToolForm:
    """How a family of models writes calls.

    Attributes:
        mark: opens the calls; "" when they have none.
        close: ends each call, "" when nothing does.
        is_bare: an object at the beginning of the answer may be a call without a mark.
        arguments: key of the arguments.
        opening, separator, closing: what a list of calls is written with.
    """

    mark: str
    close: str
    is_bare: bool
    arguments: str
    opening: str
    separator: str
    closing: str


FORMS = {
    "hermes": ToolForm("<tool_call>", "</tool_call>", False, "arguments", "", "\n", ""),
    "llama3": ToolForm("<|python_tag|>", "", True, "parameters", "", "; ", ""),
    "mistral": ToolForm("[TOOL_CALLS]", "", False, "arguments", "[", ", ", "]"),
    "json": ToolForm("", "", True, "arguments", "[", ", ", "]"),
}
_ARGUMENT_KEYS = ("arguments", "parameters")
_KNOWN_KEYS = frozenset({"name", "type", "id", *_ARGUMENT_KEYS})


class ToolParser:
    """The calls of one answer.

    Args:
        form: how they are written.
        names: the tools there are; a bare object is a call only when it names one.
        is_forced: the answer is nothing but calls.
        is_single: at most one call is wanted.

    Attributes:
        num_calls: calls begun so far.
    """

    def __init__(self, form: ToolForm, names: frozenset[str], is_forced: bool, is_single: bool) -> None:
        self.num_calls = 0
        self._form = form
        self._names = names
        self._is_single = is_single
        self._held = ""
        self._may_be_bare = form.is_bare or is_forced
        self._is_reading = False
        self._raw: list[str] = []  # of what may turn out to be no call
        self._function: list[str] = []  # name[ARGS] before an object
        self._object: _CallObject | None = None
        self._is_after_call = False

    def push(self, text: str, finished: bool) -> list[Piece]:
        """New text in, what is decided out; everything when `finished`."""
        pieces: list[Piece] = []
        self._held += text
        while self._held:
            before = (len(self._held), self._is_reading, self._is_after_call)
            self._step(pieces, finished)
            if (len(self._held), self._is_reading, self._is_after_call) == before:
                break
        if finished and self._is_reading:
            self._give_up(pieces)
        return pieces

    def _step(self, pieces: list[Piece], finished: bool) -> None:
        if self._is_reading:
            self._read(pieces)
        elif self._is_after_call and self._form.close:
            self._skip_close(finished)
        else:
            self._search(pieces, finished)

    def _search(self, pieces: list[Piece], finished: bool) -> None:
        """Look for the beginning of a call; text before it is content."""
        form = self._form
        if self._may_be_bare:
            begun = self._held.lstrip()
            if begun[:1] in ("{", "["):
                self._start(begun)
                return
            if not begun and not finished:
                return
            self._may_be_bare = False
        if form.mark:
            content, mark, rest = self._held.partition(form.mark)
            if mark:
                self._content(pieces, content.rstrip())
                self._start(rest)
                return
        keep = 0
        if not finished and form.mark:
            # White space before a call belongs to it.
            text = self._held[: len(self._held) - held_back(self._held, form.mark)]
            keep = len(self._held) - len(text.rstrip())
        self._content(pieces, self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]

    def _start(self, rest: str) -> None:
        self._is_reading, self._held = True, rest
        self._raw.clear()
        self._function.clear()

    def _content(self, pieces: list[Piece], text: str) -> None:
        if text and not (self.num_calls and text.isspace()):
            pieces.append(Piece("content", text))

    def _read(self, pieces: list[Piece]) -> None:
        """Take in the text of calls, character by character."""
        for place, character in enumerate(self._held):
            self._raw.append(character)
            if self._object is None:
                self._between(character)
                continue
            self._object.push(character)
            if self._object.is_broken:
                self._held = self._held[place + 1 :]
                self._give_up(pieces)
                return
            if self._object.is_done:
                self._report(self._object, pieces)
                self._object = None
                self._raw.clear()
                self._function.clear()
                self._is_after_call = True
                if self._form.close:
                    self._held = self._held[place + 1 :]
                    self._is_reading = False
                    return
        if self._object is not None:
            self._report(self._object, pieces)
        self._held = ""

    def _between(self, character: str) -> None:
        if character == "{":
            name = "".join(self._function)
            if self._form.mark:  # it may come again before the next call; its bracket was taken for a list's
                name = name.rpartition(self._form.mark[1:])[2]
            name = name.split("[", 1)[0].strip(" \n\t,;")
            may_refuse = self._form.is_bare and not self._is_after_call
            accepts: Callable[[str], bool] = self._names.__contains__ if may_refuse else bool
            self._object = _CallObject(accepts, name)
            self._object.push(character)
        elif character not in "[],; \n\t\r" or self._function:
            self._function.append(character)

    def _report(self, call: _CallObject, pieces: list[Piece]) -> None:
        if call.name and not call.is_reported:
            call.is_reported = True
            self.num_calls += 1
            if not (self._is_single and self.num_calls > 1):
                pieces.append(Piece("call", call.name, self.num_calls - 1))
        text = call.take() if call.is_reported else ""
        if text and not (self._is_single and self.num_calls > 1):
            pieces.append(Piece("arguments", text, self.num_calls - 1))

    def _give_up(self, pieces: list[Piece]) -> None:
        """What was read is no call, or the answer ended inside one."""
        was_reported = self._object is not None and self._object.is_reported
        text = "".join(self._raw)
        if not was_reported and text.strip(" \n[],;"):
            self._content(pieces, (self._form.mark if not self._form.is_bare else "") + text)
        self._is_reading, self._object, self._may_be_bare = False, None, False
        self._raw.clear()

    def _skip_close(self, finished: bool) -> None:
        begun = self._held.lstrip()
        close = self._form.close
        if begun.startswith(close):
            self._held, self._is_after_call = begun[len(close) :], False
        elif finished or not close.startswith(begun):
            self._is_after_call = False


class _CallObject:
    """One object {"name": ..., "arguments": {...}}, read character by character.

    Args:
        accepts: whether a name can be a call.
        name: known before the object, which then is the arguments.
    """

    def __init__(self, accepts: Callable[[str], bool], name: str = "") -> None:
        self.name = name
        self.is_reported = False
        self.is_done = False
        self.is_broken = False
        self._accepts = accepts
        self._is_arguments = bool(name)
        self._text: list[str] = []
        self._depth = 0
        self._in_string = self._is_escaped = False
        self._string_start = 0
        self._key = ""
        self._expects_key = True
        self._arguments: list[str] = []
        self._in_arguments = False

    def take(self) -> str:
        """Arguments that came since the last call."""
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    def push(self, character: str) -> None:
        self._text.append(character)
        if self._in_arguments or self._is_arguments:
            self._arguments.append(character)
        if self._in_string:
            self._push_in_string(character)
        elif character == '"':
            self._in_string, self._string_start = True, len(self._text) - 1
        elif character in "{[":
            self._depth += 1
            if self._depth == 2 and self._key in _ARGUMENT_KEYS and not self._expects_key and not self._is_arguments:
                self._in_arguments = True
                self._arguments.append(character)
            self._expects_key = self._depth == 1
        elif character in "}]":
            self._depth -= 1
            if self._depth == 1:
                self._in_arguments = False
            self._end_if_closed()
        elif self._depth == 1 and character in ":,":
            self._expects_key = character == ","

    def _push_in_string(self, character: str) -> None:
        if self._is_escaped:
            self._is_escaped = False
        elif character == "\\":
            self._is_escaped = True
        elif character == '"':
            self._in_string = False
            if self._depth == 1 and not self._is_arguments:
                self._end_string("".join(self._text[self._string_start :]))

    def _end_string(self, quoted: str) -> None:
        try:
            text = str(json.loads(quoted))
        except ValueError:
            self.is_broken = True
            return
        if self._expects_key:
            self._key = text
            self.is_broken = not self.name and text not in _KNOWN_KEYS
        elif self._key == "name":
            self.name = text
            self.is_broken = not self._accepts(text)
        elif self._key in _ARGUMENT_KEYS:
            self._arguments.append(text)  # JSON within JSON, as OpenAI writes it

    def _end_if_closed(self) -> None:
        if self._depth == 0:
            self.is_done = True
            self.is_broken = not self.name
