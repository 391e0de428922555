"""Structured outputs: which tokens may come next, by llguidance, over the vocabulary's bytes.

`check` refuses what cannot be compiled, where a request enters; `GrammarCompiler` compiles in a thread, off the step
loop; `GrammarMasks` keeps a matcher for each live sequence, and computes masks while the network runs. Time and memory
are bounded by llguidance's own fuel, not by a clock, so that the same grammar is always taken or always refused.
Imports no torch. V vocabulary size.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.core.errors import RequestError
from fastserve.core.structured_outputs import StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer
    from numpy.typing import NDArray

_PARAM = "structured_outputs"
_MAX_KEPT = 16  # compiled grammars kept for requests to come
_SCHEMA_KEYWORDS = {"items", "prefixItems", "additionalItems", "additionalProperties", "anyOf", "allOf", "oneOf"}
_SCHEMA_TABLES = {"properties", "patternProperties", "definitions", "$defs"}
# [256, 8] for a byte of a mask, the first token in its lowest bit.
_BIASES_OF_BYTE = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.float32(0), np.float32("-inf")
)
# Bytes, and one end token: enough to find out whether a grammar can be compiled, without any model's vocabulary.
_NUM_BYTES = 256


def to_grammar(wanted: StructuredOutputs) -> str:
    """llguidance's form.

    Raises:
        RequestError: not even JSON, or not a grammar in a known form.
    """
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

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
            answer = LLMatcher.grammar_from_lark(any_to_lark(wanted.grammar or ""))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the grammar cannot be read: {error}", _PARAM) from error
    except Exception as error:  # the GBNF reader has an exception of its own, which is a plain Exception
        raise RequestError(f"the grammar cannot be read: {error}", _PARAM) from error
    return _after(wanted.begins_after, answer) if wanted.begins_after else answer


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
    matcher = _compile(_byte_tokenizer(), to_grammar(wanted))
    matcher.compute_bitmask()
    matcher.consume_tokens(list(matcher.compute_ff_bytes()))  # some limits show only behind what is certain
    matcher.compute_bitmask()
    if matcher.is_error():
        raise _refusal(matcher)


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


def _compile(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_limits())
    if matcher.is_error():
        raise _refusal(matcher)
    return matcher


def _refusal(matcher: LLMatcher) -> RequestError:
    message = matcher.get_error().replace("<non-verbose/>", "").strip()
    return RequestError(f"the grammar or schema is not supported: {message[:500]}", _PARAM)


class _Vocabulary:
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
def _byte_tokenizer() -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    tokens = [bytes([byte]) for byte in range(_NUM_BYTES)] + [b"<end>"]
    vocabulary = _Vocabulary(tokens, _NUM_BYTES, [_NUM_BYTES], lambda text: list(text.encode()))
    return LLTokenizer(TokenizerWrapper(vocabulary), eos_token=_NUM_BYTES)


class GrammarCompiler:
    """Compiles grammars for one vocabulary, one at a time in a thread, and keeps the last ones.

    Args:
        load_tokenizer: called once, in the thread, when the first grammar comes.
        vocab_size: V, the width of the logits.
        end_ids: the tokens that may end an answer.
    """

    def __init__(self, load_tokenizer: Callable[[], Tokenizer], vocab_size: int, end_ids: Sequence[int]) -> None:
        self.vocab_size = vocab_size
        self.end_ids = frozenset(end_ids)
        self._load_tokenizer = load_tokenizer
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._compiled: OrderedDict[StructuredOutputs, Future[LLMatcher]] = OrderedDict()

    def submit(self, wanted: StructuredOutputs) -> Future[LLMatcher]:
        """Start to compile, unless that was done before. The future has the matcher, or a RequestError."""
        future = self._compiled.get(wanted)
        if future is None:
            future = self._thread.submit(self._compile, wanted)
            self._compiled[wanted] = future
            if len(self._compiled) > _MAX_KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(wanted)
        return future

    def matcher(self, wanted: StructuredOutputs, output_ids: Sequence[int] = ()) -> LLMatcher:
        """A matcher of one's own, which has seen `output_ids`; waits only for what `submit` has not finished."""
        matcher = self.submit(wanted).result().deep_copy()
        matcher.consume_tokens(list(output_ids))
        return matcher

    def _compile(self, wanted: StructuredOutputs) -> LLMatcher:
        return _compile(self._tokenizer, to_grammar(wanted))

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        tokenizer = self._load_tokenizer()
        if tokenizer.byte_rules is None or not self.end_ids:
            raise RequestError("structured_outputs needs a vocabulary with known bytes and an end token", _PARAM)
        tokens = [tokenizer.token_bytes(token_id) for token_id in range(self.vocab_size)]
        special = [token_id for token_id in tokenizer.special_ids | self.end_ids if token_id < self.vocab_size]
        vocabulary = _Vocabulary(
            tokens, min(self.end_ids), special, lambda text: tokenizer.encode(text, add_special_tokens=False)
        )
        return LLTokenizer(TokenizerWrapper(vocabulary), n_vocab=self.vocab_size, eos_token=sorted(self.end_ids))


class GrammarMasks:
    """The matchers of the live sequences that have a grammar.

    `prepare` before the network runs, `biases` after it, `accept` with what was made of it.
    """

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._matchers: dict[str, LLMatcher] = {}
        self._rows: dict[str, int] = {}
        self._pending: Future[NDArray[np.float32]] | None = None

    def admit(self, request_id: str, wanted: StructuredOutputs | None, output_ids: Sequence[int]) -> None:
        """A sequence begins, or is computed again after it had made `output_ids`."""
        if wanted is not None:
            self._matchers[request_id] = self._compiler.matcher(wanted, output_ids)

    def drop(self, request_id: str) -> None:
        self._matchers.pop(request_id, None)

    def prepare(self, sampling: Sequence[tuple[str, Sequence[int]]]) -> None:
        """Start on the masks of the sequences that sample in this step: (request id, draft tokens to be verified)."""
        self._rows.clear()
        if not self._matchers:
            return
        work: list[tuple[Any, int, list[int]]] = []
        num_rows = 0
        for request_id, drafts in sampling:
            if request_id in self._matchers:
                self._rows[request_id] = num_rows
                work.append((self._matchers[request_id], num_rows, list(drafts)))
                num_rows += 1 + len(drafts)
        if work:
            self._pending = self._pool.submit(self._fill, work, num_rows)

    def biases(self) -> dict[str, NDArray[np.float32]]:
        """Request id -> [1 + drafts, V] to be added to logits: -inf where a token would break the grammar, else 0.

        Once per `prepare`. Adding is ten times as fast as filling by a mask of booleans.
        """
        if self._pending is None:
            return {}
        masks, self._pending = self._pending.result(), None
        ends = [*list(self._rows.values())[1:], len(masks)]
        return {name: masks[first:end] for (name, first), end in zip(self._rows.items(), ends, strict=True)}

    def accept(self, request_id: str, token_ids: Sequence[int]) -> str | None:
        """Move a sequence on by its new tokens. Returns a message when its grammar cannot go on."""
        matcher = self._matchers.get(request_id)
        if matcher is None:
            return None
        for token_id in token_ids:
            if not matcher.consume_token(token_id):
                return str(_refusal(matcher))
            if token_id in self._compiler.end_ids:
                break  # whatever was accepted after an end is not taken by the scheduler
        return None

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "grammar-masks")

    @cached_property
    def _executor(self) -> Any:
        from llguidance import LLExecutor

        return LLExecutor(num_threads=2)

    def _fill(self, work: list[tuple[Any, int, list[int]]], num_rows: int) -> NDArray[np.float32]:
        from llguidance import numpy as masks

        allowed = masks.allocate_token_bitmask(num_rows, self._compiler.vocab_size)
        single = [(matcher, row) for matcher, row, drafts in work if not drafts]
        if single:
            masks.fill_next_token_bitmask_par(self._executor, single, allowed)
        if len(single) < len(work):
            drafted = [item for item in work if item[2]]
            masks.fill_next_token_bitmask_par_with_draft_tokens(self._executor, drafted, allowed)
        biases = _BIASES_OF_BYTE.take(allowed.view(np.uint8), axis=0).reshape(num_rows, -1)
        return biases[:, : self._compiler.vocab_size]
