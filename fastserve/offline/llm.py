"""Offline generation: `LLM(path).generate(prompts, params)` and `.chat(messages, params)`.

Drives the engine in this process; results have the shape that users of vLLM know. For many clients at once use the
server instead. Not thread-safe.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any

from fastserve.checkpoint.folder import TEXT_TO_TEXT, ModelFolder
from fastserve.checkpoint.source_text import SourceText
from fastserve.checkpoint.text_stream import TextStream
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.core.config import EngineConfig
from fastserve.core.errors import RequestError
from fastserve.core.grammars import check
from fastserve.core.outputs import CompletionOutput, Logprob, RequestOutput
from fastserve.core.request import FINISH_ERROR, FINISH_STOP, Request, TokenLogprobs, TokenOutput, fork
from fastserve.core.sampling_params import SamplingParams
from fastserve.engine.engine import Engine

_BURST_MS = 200.0  # nobody comes meanwhile

Prompt = str | Sequence[int] | Mapping[str, Any]
_Plain = str | list[int]  # a prompt without vLLM's forms
Messages = Sequence[Mapping[str, Any]]


class LLM:
    """A model ready to generate.

    Args:
        model: folder, hub id, or "" for the built-in model.
        options: fields of EngineConfig, such as dtype, max_model_len, max_batch_sequences.

    Raises:
        ConfigError, CheckpointError, MemoryPlanError: the model cannot be loaded as asked.

    Example:
        >>> llm = LLM()
        >>> llm.generate("Once upon a time", SamplingParams(max_tokens=40))[0].outputs[0].text

    Attributes:
        source_text: of an encoder-decoder, what its folder says of texts.
    """

    def __init__(self, model: str = "", **options: Any) -> None:
        config = EngineConfig.from_options({"model": str(model), "burst_ms": _BURST_MS, **options})
        folder = ModelFolder.open(config.model)
        self.tokenizer = Tokenizer.load(folder)
        self.source_text = SourceText(folder, self.tokenizer) if folder.task == TEXT_TO_TEXT else None
        self.engine = Engine(config)
        self._num_calls = 0
        self._seeds = Random(config.seed)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: str | Sequence[str] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts, batched; results are in the order of the prompts.

        Args:
            prompts: one text or one list of token ids, or a list of such; also in vLLM's form, {"prompt": text} or
                {"prompt_token_ids": ids}.
            params: for all prompts, or one per prompt; by default 16 tokens at temperature 1, and for an
                encoder-decoder what its folder says.
            lora: name of an adapter (option `lora`, or `load_lora`) for all prompts, or one per prompt; "" for none.
            use_tqdm: show a progress bar on a terminal.

        Raises:
            RequestError: an empty or too long prompt, a grammar that is not supported, an adapter that is not there,
                or as many params as there are not prompts.
        """
        return self._generate(_as_prompts(prompts), params, lora, use_tqdm, self._encode)

    def translate(
        self,
        texts: str | Sequence[str],
        target_language: str = "",
        source_language: str = "",
        params: SamplingParams | None = None,
        *,
        prefix: str = "",
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Texts in another language, by an encoder-decoder.

        Args:
            target_language, source_language: as the model calls them; "" where it knows one alone, or has a usual one.
            params: as its folder says by default.
            prefix: what is put before each text.

        Raises:
            RequestError: no encoder-decoder, or a language that it does not know (the message names those it does).
        """
        source_text = self.source_text
        if source_text is None:
            raise RequestError("this model continues texts; translate needs an encoder-decoder")

        def encode(prompt: _Plain) -> tuple[list[int], list[int]]:
            if not isinstance(prompt, str):
                raise RequestError("translate takes texts, not token ids", "texts")
            return source_text.encode(prompt, source_language, target_language, prefix)

        return self._generate(_as_prompts(texts), params, None, use_tqdm, encode)

    def _encode(self, prompt: _Plain) -> tuple[list[int], list[int]]:
        """Token ids of a prompt, and of an encoder-decoder those that its decoder begins with."""
        if self.source_text is not None:
            ids, start = self.source_text.encode(prompt if isinstance(prompt, str) else "")
            return (ids if isinstance(prompt, str) else prompt), start
        return (self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt), []

    def _generate(
        self,
        prompts: list[_Plain],
        params: SamplingParams | Sequence[SamplingParams] | None,
        lora: str | Sequence[str] | None,
        use_tqdm: bool,
        encode: Callable[[_Plain], tuple[list[int], list[int]]],
    ) -> list[RequestOutput]:
        if params is None and self.source_text is not None:
            params = SamplingParams(**self.source_text.defaults())
        jobs = self._jobs(prompts, params, lora, encode)
        try:
            with _progress_bar(len(jobs), use_tqdm) as advance:
                self._run(jobs, advance)
        except BaseException:
            self.engine.abort([stream.request.request_id for job in jobs for stream in job.streams])
            raise
        return [self._result(job) for job in jobs]

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: str | Sequence[str] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, through the model's chat template.

        Args:
            messages: [{"role": "user", "content": "..."}, ...] or a list of such lists.
            params, lora, use_tqdm: as in `generate`.
        """
        conversations: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
        texts = [self.tokenizer.render_chat([dict(message) for message in one]) for one in conversations]
        prompts = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        outputs = self.generate(prompts, params, lora=lora, use_tqdm=use_tqdm)
        for output, text in zip(outputs, texts, strict=True):
            output.prompt = text
        return outputs

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        num_beams: int = 4,
        *,
        lora: str | Sequence[str] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """The most probable answers to each prompt that a beam search finds, the best first, with their scores.

        Args:
            options: fields of SamplingParams that a search may have: n (all beams by default), max_tokens,
                length_penalty, early_stopping, ignore_eos, stop_token_ids.
        """
        options = {"n": num_beams, "temperature": 0.0, **options}
        return self.generate(prompts, SamplingParams(num_beams=num_beams, **options), lora=lora)

    def load_lora(self, name: str, path: str) -> None:
        """Make a LoRA adapter folder known under a name, within max_loras.

        Raises:
            RequestError: the folder is no adapter of this model, the name is taken, or there is no room.
        """
        self.engine.load_adapter(name, path)

    def unload_lora(self, name: str) -> None:
        """Forget an adapter; RequestError when there is none of this name."""
        self.engine.unload_adapter(name)

    def _jobs(
        self,
        prompts: list[_Plain],
        params: SamplingParams | Sequence[SamplingParams] | None,
        lora: str | Sequence[str] | None,
        encode: Callable[[_Plain], tuple[list[int], list[int]]],
    ) -> list[_Job]:
        params = SamplingParams() if params is None else params
        lora = "" if lora is None else lora
        per_prompt = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        adapters = [lora] * len(prompts) if isinstance(lora, str) else list(lora)
        for name, given in (("params", per_prompt), ("lora", adapters)):
            if len(given) != len(prompts):
                raise RequestError(f"{len(prompts)} prompts need as many {name} (or one for all), not {len(given)}")
        for wanted in {sampling.structured_outputs for sampling in per_prompt}:
            if wanted is not None:
                check(wanted)
        self._num_calls += 1
        jobs: list[_Job] = []
        for index, (prompt, sampling, adapter) in enumerate(zip(prompts, per_prompt, adapters, strict=True)):
            prompt_ids, start = encode(prompt)
            num_source, before = (len(prompt_ids), []) if start else (0, prompt_ids)
            job = _Job(prompt if isinstance(prompt, str) else None, prompt_ids)
            for number, single in enumerate(fork(sampling, self._seeds)):
                name = f"{self._num_calls}-{index}-{number}"
                now = time.monotonic()
                request = Request(name, prompt_ids + start, single, now, adapter=adapter, num_source=num_source)
                for _ in range(single.n):  # 1, but for the answers of a beam search
                    job.streams.append(_Stream(request, TextStream(self.tokenizer, before, single)))
            jobs.append(job)
        return jobs

    def _run(self, jobs: list[_Job], advance: Any) -> None:
        live: dict[str, tuple[_Job, list[_Stream]]] = {}
        for job in jobs:
            for stream in job.streams:
                request_id = stream.request.request_id
                if request_id not in live:
                    self.engine.add(stream.request)
                live.setdefault(request_id, (job, []))[1].append(stream)
        while live:
            for output in self.engine.step():
                job, streams = live[output.request_id]
                if output.finish_reason == FINISH_ERROR:
                    raise RequestError(output.error or "the engine refused this request")
                for stream, answer in zip(streams, output.as_answers(), strict=True):
                    stream.take(answer)
                if streams[0].finish_reason is None:
                    continue
                if output.finish_reason is None:
                    self.engine.abort([output.request_id])
                del live[output.request_id]
                job.num_finished += len(streams)
                if job.num_finished == len(job.streams):
                    advance()

    def _result(self, job: _Job) -> RequestOutput:
        first = job.streams[0]
        prompt_logprobs = None
        if first.prompt_logprobs is not None:
            prompt_logprobs = [None if item is None else self._named(item) for item in first.prompt_logprobs]
        outputs = [
            CompletionOutput(
                index=index,
                text=stream.text.text,
                token_ids=stream.token_ids,
                finish_reason=stream.finish_reason,
                stop_reason=stream.stop_reason,
                logprobs=[self._named(item) for item in stream.logprobs] if stream.logprobs else None,
                score=stream.score,
            )
            for index, stream in enumerate(job.streams)
        ]
        return RequestOutput(
            request_id=first.request.request_id.rpartition("-")[0],
            prompt=job.prompt,
            prompt_token_ids=job.prompt_ids,
            outputs=outputs,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=first.num_cached_tokens,
        )

    def _named(self, item: TokenLogprobs) -> dict[int, Logprob]:
        """vLLM's form: token id -> Logprob, the token itself first."""
        named: dict[int, Logprob] = {}
        for place, (token_id, logprob) in enumerate(zip(item.token_ids, item.logprobs, strict=True)):
            if token_id not in named:
                rank = item.rank if place == 0 else place
                named[token_id] = Logprob(logprob, rank, self.tokenizer.token_text(token_id))
        return named


@dataclass(slots=True)
class _Stream:
    """One completion in the making."""

    request: Request
    text: TextStream
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    score: float | None = None

    def take(self, output: TokenOutput) -> None:
        if not self.token_ids:
            self.prompt_logprobs = output.prompt_logprobs
            self.num_cached_tokens = output.num_cached_tokens
        self.text.push(output.token_ids, output.finish_reason is not None, output.stop_token_id)
        taken = self.text.num_tokens - len(self.token_ids)  # those after a stop string are not the answer's
        self.token_ids.extend(output.token_ids[:taken])
        self.logprobs.extend((output.logprobs or [])[:taken])
        self.finish_reason, self.score = output.finish_reason, output.score
        if self.text.stop_reason is not None:
            self.finish_reason, self.stop_reason = FINISH_STOP, self.text.stop_reason
        elif output.stop_token_id in self.request.sampling.stop_token_ids:
            self.stop_reason = output.stop_token_id


@dataclass(slots=True)
class _Job:
    """One prompt and its completions."""

    prompt: str | None
    prompt_ids: list[int]
    streams: list[_Stream] = field(default_factory=list)
    num_finished: int = 0


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[_Plain]:
    is_one = isinstance(prompts, str | Mapping) or (len(prompts) > 0 and isinstance(prompts[0], int))
    return [_as_prompt(prompt) for prompt in ([prompts] if is_one else prompts)]


def _as_prompt(prompt: Any) -> _Plain:
    if isinstance(prompt, Mapping) and prompt.keys() <= {"prompt", "prompt_token_ids"}:
        prompt = prompt.get("prompt_token_ids", prompt.get("prompt"))
    if isinstance(prompt, str):
        return prompt
    try:
        return [operator.index(token_id) for token_id in prompt]
    except TypeError as error:
        raise RequestError(
            'a prompt is a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}', "prompt"
        ) from error


@contextmanager
def _progress_bar(total: int, wanted: bool) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (wanted and console.is_terminal)) as progress:
        task = progress.add_task("generating", total=total)
        yield lambda: progress.advance(task)
