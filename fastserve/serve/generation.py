"""The one path from a prompt to text: prompts -> Requests -> TokenOutputs -> Deltas.

Both endpoints use it, streaming or not. A Generation is what one HTTP request asked for: one or more prompts times n
choices. It finds stop strings (a hit aborts the sequence in the engine), counts tokens and feeds the metrics; it knows
nothing of how replies look.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import TypeVar

from msgspec.structs import replace as replace_fields

from fastserve.checkpoint.text_stream import TextStream
from fastserve.checkpoint.tokenizer import LONG_TEXT, Tokenizer, check_unicode
from fastserve.core.arrays import ModelInfo
from fastserve.core.errors import FastServeError, QueueFullError, RequestError
from fastserve.core.request import FINISH_ABORT, FINISH_ERROR, FINISH_STOP, Request, TokenLogprobs, TokenOutput, fork
from fastserve.core.sampling_params import SamplingParams
from fastserve.engine.client import EngineClient
from fastserve.engine.token_stream import TokenStream
from fastserve.scheduler.policy import POLICY_NAMES
from fastserve.serve.admission import Admission
from fastserve.serve.errors import ApiError
from fastserve.serve.metrics import Metrics

_T = TypeVar("_T")


async def in_thread_if_long(make: Callable[[], _T], num_characters: int) -> _T:
    """What `make` returns, which tokenises so many characters: if many, in a thread, not to hold up other streams."""
    return make() if num_characters < LONG_TEXT else await asyncio.to_thread(make)


@dataclass(frozen=True, slots=True)
class Target:
    """An encoder-decoder beside the server's own model, and what its decoder is to begin with."""

    model: ModelInfo
    tokenizer: Tokenizer
    start_ids: list[int]


@dataclass(slots=True)
class Choice:
    """One completion in the making. `index` is its place in the reply: prompts in order, n choices of each together."""

    index: int
    prompt_index: int
    request: Request
    text_stream: TextStream
    num_tokens: int = 0
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    scheduled_time: float = 0.0
    first_time: float = 0.0
    last_time: float = 0.0


@dataclass(frozen=True, slots=True)
class Delta:
    """What one token output added to a choice."""

    choice: Choice
    text: str
    logprobs: list[TokenLogprobs]
    is_first: bool


@dataclass(slots=True)
class Usage:
    """Token counts of a whole reply; `cached_tokens` is the part of the prompts found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(slots=True)
class Answer:
    """A finished choice, whole."""

    choice: Choice
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class Generation:
    """Choices that are being made; iterate `deltas()` or await `collect()`, and `close()` in any case."""

    def __init__(
        self, choices: list[Choice], stream: TokenStream, metrics: Metrics, on_close: Callable[[], None]
    ) -> None:
        self.choices = choices
        self._stream = stream
        self._metrics = metrics
        self._on_close = on_close
        self._first_of = {choice.request.request_id: choice.index for choice in reversed(choices)}
        self._deadline: asyncio.TimerHandle | None = None

    def end_after(self, seconds: float) -> None:
        """Stop after this time; the reader gets what there is, and then the error."""
        error = ApiError(
            f"the answer was not ready within {seconds:g} s; ask for fewer tokens or allow more time",
            504,
            code="deadline_exceeded",
        )
        self._deadline = asyncio.get_running_loop().call_later(seconds, self._stream.fail, error)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """New text of any choice, as it comes.

        Raises:
            FastServeError: the engine died, or refused the request (RequestError).
        """
        async for output in self._stream:
            if output.finish_reason == FINISH_ERROR:
                text = output.error or "the engine refused this request"
                raise RequestError(text) if output.is_refused else FastServeError(text)
            first = self._first_of[output.request_id]
            for choice, answer in zip(self.choices[first:], output.as_answers(), strict=False):
                delta = self._take(choice, answer)
                if choice.finish_reason is not None:
                    if answer.finish_reason is None:
                        self._stream.drop(output.request_id)
                    self._metrics.observe_end(choice)
                yield delta

    async def collect(self) -> list[Answer]:
        """Every choice, finished. Stops the engine's work when this is cancelled."""
        answers = [Answer(choice) for choice in self.choices]
        pieces: list[list[str]] = [[] for _ in answers]
        try:
            async for delta in self.deltas():
                pieces[delta.choice.index].append(delta.text)
                answers[delta.choice.index].logprobs.extend(delta.logprobs)
        finally:
            self.close()
        firsts: dict[int, Choice] = {}
        for answer, texts in zip(answers, pieces, strict=True):
            answer.text = "".join(texts)
            # Only the first choice of a prompt has scored it (see `fork`).
            first = firsts.setdefault(answer.choice.prompt_index, answer.choice)
            answer.choice.prompt_logprobs = first.prompt_logprobs
        return answers

    def close(self) -> None:
        """Stop what still runs; a choice that had not finished counts as aborted."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._stream.close()
        self._on_close()
        for choice in self.choices:
            if choice.finish_reason is None:
                choice.finish_reason = FINISH_ABORT
                self._metrics.observe_abort()

    @property
    def usage(self) -> Usage:
        """Counts so far; each prompt counts once, whatever n is."""
        firsts = {choice.prompt_index: choice for choice in reversed(self.choices)}
        return Usage(
            prompt_tokens=sum(c.request.num_source or len(c.request.prompt_ids) for c in firsts.values()),
            completion_tokens=sum(choice.num_tokens for choice in self.choices),
            cached_tokens=sum(choice.num_cached_tokens for choice in firsts.values()),
        )

    def _take(self, choice: Choice, output: TokenOutput) -> Delta:
        is_first = choice.last_time == 0.0
        if is_first:
            choice.num_cached_tokens = output.num_cached_tokens
            choice.prompt_logprobs = output.prompt_logprobs
        taken, text = _push(choice, output)
        now = time.monotonic()
        self._metrics.observe_tokens(choice, now, output.scheduled_time, taken)
        choice.first_time = choice.first_time or now
        choice.last_time = now
        return Delta(choice, text, (output.logprobs or [])[:taken], is_first)


def _push(choice: Choice, output: TokenOutput) -> tuple[int, str]:
    """Turn the new tokens into text; returns how many of them belong to the completion (a stop string cuts)."""
    stream = choice.text_stream
    text = stream.push(output.token_ids, output.finish_reason is not None, output.stop_token_id)
    taken = stream.num_tokens - choice.num_tokens
    choice.num_tokens = stream.num_tokens
    if stream.stop_reason is not None:
        choice.finish_reason, choice.stop_reason = FINISH_STOP, stream.stop_reason
    elif output.finish_reason is not None:
        choice.finish_reason = output.finish_reason
        if output.stop_token_id in choice.request.sampling.stop_token_ids:
            choice.stop_reason = output.stop_token_id
    return taken, text


class Generator:
    """Starts generations on one model: checks lengths and ids, splits n, hands the requests to the engine."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        metrics: Metrics,
        admission: Admission,
        max_seconds: float = 0.0,
    ) -> None:
        """
        Args:
            admission: the budgets.
            max_seconds: longest time for any request; 0 is no limit.
        """
        self._client = client
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._admission = admission
        self._max_seconds = max_seconds
        self._seeds = Random(client.config.seed)
        self.is_draining = False

    def check_open(self) -> None:
        """Raise ApiError (503) while no request can be taken."""
        if self.is_draining:
            raise ApiError("the server is shutting down", 503, code="draining", retry_after=5)
        if self._client.ready is None:
            raise ApiError("the model is still being loaded", 503, code="starting", retry_after=2)

    @property
    def max_model_len(self) -> int:
        """Longest prompt and answer together, tokens."""
        assert self._client.ready is not None
        return self._client.ready.max_model_len

    def token_ids(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`.

        Raises:
            RequestError: half of a surrogate pair, which JSON can write and no text can hold.
        """
        check_unicode(text)
        return self._tokenizer.encode(text, add_special_tokens)

    async def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """`token_ids`, in a thread if the text is long."""
        return await in_thread_if_long(lambda: self.token_ids(text, add_special_tokens), len(text))

    def start(
        self,
        name: str,
        prompts: Sequence[list[int]],
        sampling: SamplingParams,
        priority: int = 0,
        *,
        tenant: str = "",
        adapter: str = "",
        seconds: float | None = None,
        target: Target | None = None,
        all_score: bool = False,
    ) -> Generation:
        """Queue every choice of every prompt under request ids that begin with `name`.

        Args:
            tenant: on whose account.
            adapter: with which LoRA adapter; "" for none.
            seconds: time that the client gives us; None is no limit of its own.
            target: whom it is for, where that is not the server's own model; `prompts` are sources then.
            all_score: every choice scores its prompt, for those who read them as they come; see `fork`.

        Raises:
            RequestError, ApiError: a prompt is too long, or has ids outside the vocabulary.
            QueueFullError, EngineDeadError: it cannot be taken now.
        """
        self.check_open()
        scheduler = self._client.config.scheduler
        if priority and scheduler in POLICY_NAMES and scheduler != "priority":
            raise RequestError(
                f"priority has no effect here, because {scheduler} orders the requests; leave it out, or start "
                "the server with --scheduler priority",
                "priority",
            )
        self._client.check_count(len(prompts) * max(sampling.n, sampling.num_beams))
        now = time.monotonic()
        choices: list[Choice] = []
        for prompt_index, prompt_ids in enumerate(prompts):
            fitted = self._fit(prompt_ids, sampling) if target is None else _fit_source(prompt_ids, sampling, target)
            for single in fork(fitted, self._seeds, all_score):
                request = Request(f"{name}-{len(choices)}", prompt_ids, single, now, priority, tenant, adapter)
                if target is not None:
                    given, num_source = prompt_ids + target.start_ids, len(prompt_ids)
                    request = replace_fields(request, prompt_ids=given, num_source=num_source, model=target.model.name)
                for _ in range(single.n):  # 1, but for the answers of a beam search
                    tokenizer, before = (self._tokenizer, prompt_ids) if target is None else (target.tokenizer, [])
                    text_stream = TextStream(tokenizer, before, single)
                    choices.append(Choice(len(choices), prompt_index, request, text_stream))
        requests = list({choice.request.request_id: choice.request for choice in choices}.values())
        cost = sum(
            (len(request.prompt_ids) + (request.sampling.max_tokens or 0)) * request.sampling.num_beams
            for request in requests
        )
        longest = self.max_model_len if target is None else target.model.max_len + target.model.max_answer
        full_batch = self._client.config.max_batch_sequences * longest
        try:
            leave = self._admission.enter(tenant, len(choices), cost, self._client.capacity, full_batch)
            try:
                stream = self._client.stream(*requests)
            except BaseException:
                leave()
                raise
        except QueueFullError:
            self._metrics.observe_refusal(tenant, len(choices))
            raise
        self._metrics.observe_admission(tenant, len(choices), sum(len(request.prompt_ids) for request in requests))
        generation = Generation(choices, stream, self._metrics, leave)
        limit = min(filter(None, (seconds, self._max_seconds)), default=0.0)
        if limit:
            generation.end_after(limit)
        return generation

    def _fit(self, prompt_ids: list[int], sampling: SamplingParams) -> SamplingParams:
        """`sampling` with max_tokens resolved against the room that the prompt leaves."""
        assert self._client.ready is not None
        limit, vocab_size = self.max_model_len, self._client.ready.vocab_size
        if not prompt_ids:
            raise RequestError("the prompt is empty; give at least one token", "prompt")
        if max(prompt_ids) >= vocab_size:
            raise RequestError(f"the prompt has token id {max(prompt_ids)}; ids end at {vocab_size - 1}", "prompt")
        for field_name, token_ids in (("stop_token_ids", sampling.stop_token_ids), ("logit_bias", sampling.logit_bias)):
            if token_ids and max(token_ids) >= vocab_size:
                raise RequestError(f"{field_name} has id {max(token_ids)}; ids end at {vocab_size - 1}", field_name)
        room = limit - len(prompt_ids)
        if room < 1:
            raise _too_long(f"the prompt has {len(prompt_ids)} tokens; the model takes at most {limit - 1}", "prompt")
        if sampling.max_tokens is not None and sampling.max_tokens > room:
            raise _too_long(
                f"the model's context is {limit} tokens, but {len(prompt_ids)} in the prompt and {sampling.max_tokens} "
                f"to make (max_tokens) are {len(prompt_ids) + sampling.max_tokens}; lower max_tokens or leave it out",
                "max_tokens",
            )
        return replace(sampling, max_tokens=room if sampling.max_tokens is None else sampling.max_tokens)


def _fit_source(source_ids: list[int], sampling: SamplingParams, target: Target) -> SamplingParams:
    """`sampling` with max_tokens within what the model answers at most."""
    info, room = target.model, target.model.max_answer - len(target.start_ids)
    if not source_ids:
        raise RequestError("the text is empty; give at least one word", "prompt")
    if len(source_ids) > info.max_len:
        raise _too_long(f"the text has {len(source_ids)} tokens; {info.name} takes at most {info.max_len}", "prompt")
    if max(source_ids) >= info.vocab_size:
        raise RequestError(f"the text has token id {max(source_ids)}; ids end at {info.vocab_size - 1}", "prompt")
    if sampling.max_tokens is not None and sampling.max_tokens > room:
        raise _too_long(f"{info.name} answers with at most {room} tokens; lower max_tokens", "max_tokens")
    return replace(sampling, max_tokens=sampling.max_tokens or room)


def _too_long(message: str, param: str) -> ApiError:
    return ApiError(message, 400, param=param, code="context_length_exceeded")
