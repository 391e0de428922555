"""Tools and thoughts of a chat request: what the template is told, what a grammar enforces, who reads the answer.

Made once per request; `AnswerReader` then turns each choice's text into pieces.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.core.errors import RequestError
from fastserve.core.structured_outputs import StructuredOutputs
from fastserve.serve.openai import NamedTool, Tool
from fastserve.serve.reasoning import CLOSE, OPEN, Piece, ReasoningSplitter
from fastserve.serve.tool_parser import FORMS, ToolForm, ToolParser

_HINT = (
    "You can call these functions:\n{tools}\n"
    'To call some, answer with nothing but a JSON list such as [{{"name": "...", "arguments": {{...}}}}].'
)


class AnswerReader:
    """Reads one choice: thoughts first, then text and calls."""

    def __init__(self, splitter: ReasoningSplitter | None, parser: ToolParser | None, is_named: bool) -> None:
        self._splitter = splitter
        self._parser = parser
        self._is_named = is_named

    def push(self, text: str, finished: bool) -> list[Piece]:
        """New text in, pieces that may be sent out; everything when `finished`."""
        pieces = [Piece("content", text)] if text else []
        if self._splitter is not None:
            pieces = self._splitter.push(text, finished)
        if self._parser is None:
            return pieces
        thoughts = [piece for piece in pieces if piece.kind == "reasoning"]
        content = "".join(piece.text for piece in pieces if piece.kind == "content")
        return thoughts + self._parser.push(content, finished)

    def finish_reason(self, reason: str | None) -> str | None:
        """OpenAI's word for the end of an answer with calls; of one whose tool was named beforehand it stays "stop"."""
        called = self._parser is not None and self._parser.num_calls > 0 and not self._is_named
        return "tool_calls" if called and reason == "stop" else reason


@dataclass(frozen=True, slots=True)
class ChatStyle:
    """What a model's chat template tells about the way it answers.

    Attributes:
        form: how it writes tool calls.
        takes_tools: its template shows tools to it.
        reasons: it thinks aloud.
    """

    form: ToolForm
    takes_tools: bool
    reasons: bool

    @classmethod
    def find(cls, template: str, tool_call_format: str = "auto", reasoning: str = "auto") -> ChatStyle:
        """Read the template's source, where the options leave it open."""
        if tool_call_format == "auto":
            found = (name for name, form in FORMS.items() if form.mark and form.mark in template)
            tool_call_format = next(found, "json")
        reasons = CLOSE in template if reasoning == "auto" else reasoning == "on"
        return cls(FORMS[tool_call_format], "tools" in template, reasons)


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one request. `forced` are those of which one must be called; empty when it is free."""

    style: ChatStyle
    tools: Sequence[Tool]
    forced: Sequence[Tool]
    is_named: bool
    is_single: bool

    @classmethod
    def none(cls, style: ChatStyle) -> ToolUse:
        """A request without tools."""
        return cls(style, (), (), False, False)

    @classmethod
    def of(
        cls,
        style: ChatStyle,
        tools: Sequence[Tool],
        choice: str | NamedTool | None,
        *,
        is_single: bool,
        has_form: bool,
    ) -> ToolUse:
        """
        Args:
            is_single: at most one call is wanted.
            has_form: the answer was asked for in a form of its own.

        Raises:
            RequestError: a choice without tools, of one that is not there, or beside another form of the answer.
        """
        names = [tool.function.name for tool in tools]
        if len(set(names)) < len(names):
            raise RequestError("two tools have the same name", "tools")
        if not tools and (choice == "required" or isinstance(choice, NamedTool)):
            raise RequestError("tool_choice needs tools", "tool_choice")
        if not tools or choice == "none":
            return cls.none(style)
        if has_form:
            raise RequestError('response_format and the like exclude tools; set tool_choice to "none"', "tools")
        is_named = isinstance(choice, NamedTool)
        forced: Sequence[Tool] = tools if choice == "required" else []
        if isinstance(choice, NamedTool):
            forced = [tool for tool in tools if tool.function.name == choice.function.name]
            if not forced:
                raise RequestError(f"tool_choice names {choice.function.name}, which is not among tools", "tool_choice")
        return cls(style, tools, forced, is_named, is_named or is_single)

    def for_template(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        """Messages and tools as the template takes them; tools go into the system message where it takes none."""
        if not self.tools:
            return messages, None
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools]
        if self.style.takes_tools:
            return messages, tools
        hint = _HINT.format(tools="\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools))
        if messages[0]["role"] == "system":
            first = {**messages[0], "content": f"{messages[0]['content']}\n\n{hint}"}
            return [first, *messages[1:]], None
        return [{"role": "system", "content": hint}, *messages], None

    def structure(self) -> StructuredOutputs | None:
        """The grammar of an answer that must call a tool, in the model's own form."""
        if not self.forced:
            return None
        form = self.style.form
        rules, names = [], []
        for index, tool in enumerate(self.forced):
            head = f'{{"name": {json.dumps(tool.function.name)}, "{form.arguments}": '
            schema = json.dumps(tool.function.parameters or {"type": "object"})
            rules.append(f'call_{index}: {json.dumps(head)} arguments_{index} "}}"\narguments_{index}: %json {schema}')
            names.append(f"call_{index}")
        one = f"one: {_quoted(form.mark if form.close else '', after=chr(10))} ({' | '.join(names)})"
        one += f" {_quoted(form.close, before=chr(10))}"
        more = "" if self.is_single else f"({json.dumps(form.separator)} one)*"
        start = f"start: {_quoted(form.opening)} one {more} {_quoted(form.closing)}"
        return StructuredOutputs(grammar="\n".join([start, one, *rules]))

    def parser(self) -> ToolParser | None:
        """A reader of the calls of one choice."""
        if not self.tools:
            return None
        names = frozenset(tool.function.name for tool in self.tools)
        return ToolParser(self.style.form, names, bool(self.forced), self.is_single)

    def reader(self, prompt: str) -> AnswerReader | None:
        """The reader of one choice after `prompt`; None when its text is all content."""
        parser = self.parser()
        splitter = ReasoningSplitter(prompt.rstrip().endswith(OPEN)) if self.style.reasons else None
        return None if parser is None and splitter is None else AnswerReader(splitter, parser, self.is_named)

    def begins_after(self, prompt: str) -> str:
        """The mark after which a form of the answer begins: thoughts come first, unless the prompt has closed them."""
        return CLOSE if self.style.reasons and not prompt.rstrip().endswith(CLOSE) else ""

    def needs_special_tokens(self, tokenizer: Tokenizer) -> bool:
        """Whether marks are special tokens, which texts otherwise leave out."""
        marks = [self.style.form.mark] if self.tools else []
        marks += [OPEN, CLOSE] if self.style.reasons else []
        return any(mark and tokenizer.token_id(mark) in tokenizer.special_ids for mark in marks)


def _quoted(text: str, before: str = "", after: str = "") -> str:
    return json.dumps(before + text + after) if text else ""


def describe_calls(pieces: Sequence[Piece]) -> list[dict[str, str]]:
    """The calls of a whole answer: name and arguments of each, in order."""
    calls: list[dict[str, str]] = []
    for piece in pieces:
        if piece.kind == "call":
            calls.append({"name": piece.text, "arguments": ""})
        elif piece.kind == "arguments":
            calls[piece.index]["arguments"] += piece.text
    return calls
