"""Grammars of structured outputs: what was asked for in llguidance's form, and whether that can be compiled.

Where a request enters, `check` refuses what cannot be; the engine compiles for its model's vocabulary
(`engine/grammar.py`). Time and memory are bounded by llguidance's own fuel, not by a clock, so that the same grammar is
always taken or always refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from fastserve.core.errors import RequestError
from fastserve.core.structured_outputs import StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

_PARAM = "structured_outputs"
_SCHEMA_KEYWORDS = {"items", "prefixItems", "additionalItems", "additionalProperties", "anyOf", "allOf", "oneOf"}
_SCHEMA_TABLES = {"properties", "patternProperties", "definitions", "$defs"}
# Bytes, and one end token: enough to find out whether a grammar can be compiled, without any model's vocabulary.
_NUM_BYTES = 256
# What tells Lark's form from GBNF, looked for within lines: llguidance's own test takes minutes over empty ones.
_LARK = re.compile(r"^[^\S\n]*(?:%llguidance\b|start\s*:)", re.MULTILINE)
_MAX_GBNF_RULES = 500  # reading them takes time that grows with the square of their number


def to_grammar(wanted: StructuredOutputs) -> str:
    """llguidance's form.

    Raises:
        RequestError: not even JSON, or not a grammar in a known form.
    """
    from llguidance import LLMatcher

    try:
        if wanted.json is not None or wanted.json_object:
            schema = wanted.json or '{"type": "object"}'
            _refuse_by_name(json.loads(schema))
            flexible = not wanted.disable_any_whitespace
            answer = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": flexible})
        elif wanted.regex is not None:
            answer = LLMatcher.grammar_from_regex(wanted.regex)
        elif wanted.choice is not None:
            answer = LLMatcher.grammar_from_lark("start: " + " | ".join(map(_quoted, wanted.choice)))
        else:
            answer = LLMatcher.grammar_from_lark(_to_lark(wanted.grammar or ""))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the grammar cannot be read: {error}", _PARAM) from error
    except Exception as error:  # the GBNF reader has an exception of its own, which is a plain Exception
        raise RequestError(f"the grammar cannot be read: {error}", _PARAM) from error
    return _after(wanted.begins_after, answer) if wanted.begins_after else answer


def _to_lark(grammar: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if _LARK.search(grammar):
        return grammar
    if grammar.count("::=") > _MAX_GBNF_RULES:
        raise RequestError(f"GBNF may have {_MAX_GBNF_RULES} rules here; write more of them in Lark's form", _PARAM)
    return str(gbnf_to_lark(grammar))


def _refuse_by_name(schema: Any) -> None:
    """Refuse keywords that llguidance passes over although they restrict, or change what a reference means."""
    todo, is_root = [schema], True
    while todo:
        node = todo.pop()
        if isinstance(node, list):
            todo.extend(node)
        elif isinstance(node, dict):
            nested = [] if is_root or not isinstance(node.get("$id"), str) else ["$id"]
            for name in (*nested, "contentMediaType", "contentEncoding"):
                if name in node:
                    raise RequestError(f"the schema is not supported: keyword {name}", _PARAM)
            todo.extend(node[name] for name in _SCHEMA_KEYWORDS & node.keys())
            for name in _SCHEMA_TABLES & node.keys():
                todo.extend(node[name].values() if isinstance(node[name], dict) else ())
        is_root = False


def check(wanted: StructuredOutputs) -> None:
    """Compile for bytes and compute the first masks; takes milliseconds, at most about a second.

    Raises:
        RequestError: a keyword that is not supported (it is named), a broken grammar, or one beyond the limits.
    """
    matcher = compile_for(byte_tokenizer(), to_grammar(wanted))
    matcher.compute_bitmask()
    matcher.consume_tokens(list(matcher.compute_ff_bytes()))  # some limits show only behind what is certain
    matcher.compute_bitmask()
    if matcher.is_error():
        raise refusal(matcher)


def _quoted(text: str) -> str:
    if not text:
        raise RequestError("choice takes texts with at least one character", _PARAM)
    return json.dumps(text, ensure_ascii=False)


def _after(mark: str, answer: str) -> str:
    """Free text up to and with `mark`, some white space, then `answer`."""
    # Lark stays as it is; the other forms are JSON already.
    (inner,) = json.loads(answer)["grammars"] if answer.lstrip().startswith("{") else ({"lark_grammar": answer},)
    lark = f"start: free gap? @answer\nfree[suffix={json.dumps(mark)}]: /(?s:.*)/\ngap: /[ \\n]{{1,4}}/"
    return json.dumps({"grammars": [{"name": "main", "lark_grammar": lark}, {**inner, "name": "answer"}]})


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    # A lexer state takes 1-2 kB; fuel of 50,000 is about a millisecond (llguidance's own figures).
    return LLParserLimits(
        initial_lexer_fuel=10_000_000, step_lexer_fuel=200_000, max_lexer_states=20_000, verbose_errors=False
    )


def compile_for(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the beginning of an answer, or RequestError."""
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_limits())
    if matcher.is_error():
        raise refusal(matcher)
    return matcher


def refusal(matcher: LLMatcher) -> RequestError:
    """Why it cannot go on, for the user."""
    message = matcher.get_error().replace("<non-verbose/>", "").strip()
    return RequestError(f"the grammar or schema is not supported: {message[:500]}", _PARAM)


class Vocabulary:
    """What llguidance wants to know of a tokenizer."""

    def __init__(
        self, tokens: list[bytes], end_id: int, special_ids: Sequence[int], encode: Callable[[str], list[int]]
    ) -> None:
        self.tokens = tokens
        self.eos_token_id = end_id
        self.bos_token_id = None
        self.special_token_ids = list(special_ids)
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


@cache
def byte_tokenizer() -> LLTokenizer:
    """For no model in particular."""
    from llguidance import LLTokenizer, TokenizerWrapper

    tokens = [bytes([byte]) for byte in range(_NUM_BYTES)] + [b"<end>"]
    vocabulary = Vocabulary(tokens, _NUM_BYTES, [_NUM_BYTES], lambda text: list(text.encode()))
    return LLTokenizer(TokenizerWrapper(vocabulary), eos_token=_NUM_BYTES)
