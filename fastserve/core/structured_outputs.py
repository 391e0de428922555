"""What form an answer must have: a JSON schema, any JSON object, a regular expression, one of some texts, or a grammar.

Plain text that any process can hold and send; `core/grammars.py` reads it. The names are vLLM's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from fastserve.core.errors import RequestError

MAX_GRAMMAR_LENGTH = 128 * 1024
MAX_CHOICES = 1024
_PARAM = "structured_outputs"


@dataclass(frozen=True, slots=True)
class StructuredOutputs:
    """Exactly one of the first five says what the answer must be.

    Args:
        json: a JSON schema, as an object or as text.
        json_object: any JSON object.
        regex: the whole answer matches this regular expression (Rust's syntax: no look-around, no back-references).
        choice: the answer is one of these texts.
        grammar: a context-free grammar in Lark's form, or in llama.cpp's GBNF.
        disable_any_whitespace: JSON comes without white space between its parts.
        begins_after: free text may come first and ends with this text, such as "</think>"; "" for none.

    Raises:
        RequestError: none or several are given, or one is too long.
    """

    json: str | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    disable_any_whitespace: bool = False
    begins_after: str = ""

    def __post_init__(self) -> None:
        schema: Any = self.json
        if schema is not None and not isinstance(schema, str):
            object.__setattr__(self, "json", _dump(schema))
        if self.choice is not None:
            object.__setattr__(self, "choice", tuple(self.choice))
        given = [
            name
            for name in ("json", "json_object", "regex", "choice", "grammar")
            if getattr(self, name) not in (None, False)
        ]
        if len(given) != 1:
            raise RequestError(
                "structured_outputs takes exactly one of json, json_object, regex, choice and grammar, not "
                f"{' and '.join(given) or 'none'}",
                _PARAM,
            )
        for text in (self.json, self.regex, self.grammar, self.begins_after, *(self.choice or ())):
            _check_text(text)
        if self.choice is not None and not 0 < len(self.choice) <= MAX_CHOICES:
            raise RequestError(f"choice takes 1 to {MAX_CHOICES} texts, not {len(self.choice)}", _PARAM)
        if sum(map(len, self.choice or ())) > MAX_GRAMMAR_LENGTH:
            raise RequestError(f"the choices have more than {MAX_GRAMMAR_LENGTH} characters together", _PARAM)


def _dump(schema: Any) -> str:
    try:
        return json.dumps(schema, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"the JSON schema cannot be read: {error}", _PARAM) from error


def _check_text(text: Any) -> None:
    if text is None:
        return
    if not isinstance(text, str):
        raise RequestError(f"structured_outputs takes texts, not {type(text).__name__}", _PARAM)
    if len(text) > MAX_GRAMMAR_LENGTH:
        raise RequestError(f"a grammar may have {MAX_GRAMMAR_LENGTH} characters; this one has {len(text)}", _PARAM)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError("a grammar must be valid Unicode; this one has half of a surrogate pair", _PARAM) from error
