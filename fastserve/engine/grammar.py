"""Structured outputs: which tokens may come next, by llguidance, over the vocabulary's bytes (`core/grammars.py`).

`GrammarCompiler` compiles in a thread, off the step loop; `GrammarMasks` keeps a matcher for each live sequence, and
computes masks while the network runs. Imports no torch. V vocabulary size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.core.errors import RequestError
from fastserve.core.grammars import Vocabulary, compile_for, refusal, to_grammar
from fastserve.core.structured_outputs import StructuredOutputs

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from numpy.typing import NDArray

_PARAM = "structured_outputs"
_MAX_KEPT = 16  # compiled grammars kept for requests to come
# [256, 8] for a byte of a mask, the first token in its lowest bit.
_BIASES_OF_BYTE = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), np.float32(0), np.float32("-inf")
)


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
        return compile_for(self._tokenizer, to_grammar(wanted))

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        tokenizer = self._load_tokenizer()
        if tokenizer.byte_rules is None or not self.end_ids:
            raise RequestError("structured_outputs needs a vocabulary with known bytes and an end token", _PARAM)
        tokens = [tokenizer.token_bytes(token_id) for token_id in range(self.vocab_size)]
        special = [token_id for token_id in tokenizer.special_ids | self.end_ids if token_id < self.vocab_size]
        vocabulary = Vocabulary(
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

    def __bool__(self) -> bool:
        return bool(self._matchers)

    def admit(self, request_id: str, wanted: StructuredOutputs | None, output_ids: Sequence[int]) -> None:
        """A sequence begins, or is computed again after it had made `output_ids`."""
        if wanted is not None:
            self._matchers[request_id] = self._compiler.matcher(wanted, output_ids)

    def drop(self, request_id: str) -> None:
        self._matchers.pop(request_id, None)

    def prepare(self, sampling: Sequence[tuple[str, Sequence[int]]]) -> None:
        """Start on the masks of the sequences that sample in this step: (request id, draft tokens to be verified)."""
        self._rows.clear()
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
                return str(refusal(matcher))
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
