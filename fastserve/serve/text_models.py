"""Encoder-decoders over HTTP: /v1/translations, and /v1/completions where the model is one of them.

A prompt is a source here: the text to be translated or summarised. What a body leaves out is as the model's folder
says (beams, length penalty, longest answer), as in transformers' pipelines. Streams and budgets are those of `app.py`.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field

from fastserve.checkpoint.folder import ModelFolder
from fastserve.checkpoint.source_text import SourceText, over_defaults
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.core.arrays import ModelInfo
from fastserve.core.errors import RequestError
from fastserve.core.sampling_params import SamplingParams
from fastserve.engine.client import EngineClient
from fastserve.serve.errors import ApiError
from fastserve.serve.generation import Target, in_thread_if_long
from fastserve.serve.openai import MAX_PROMPTS, CompletionBody, GenerationBody, Name
from fastserve.serve.replies import CompletionReply, Reply

# What of a text completion has no meaning for a source, and how it may be there all the same.
_NOT_HERE: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "echo": (None, False),
    "best_of": (None, 1),
    "prompt_logprobs": (None,),
}
Sources = list[tuple[list[int], list[int]]]  # token ids, and what the decoder begins with
Answer = Callable[[GenerationBody, list[list[int]], SamplingParams, Reply, Request, Target], Awaitable[Response]]


class TranslationBody(GenerationBody):
    """POST /v1/translations: one text or several, and from which language to which, where the model knows several."""

    text: str | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
    source_language: Name = ""
    target_language: Name = ""

    @property
    def num_logprobs(self) -> int | None:
        return None


class TranslationReply(CompletionReply):
    """Replies of /v1/translations: completions by another name."""

    KIND = "translation"
    CHUNK_KIND = "translation.chunk"


@dataclass(frozen=True, slots=True)
class TextModel:
    """An encoder-decoder: what the engine says of it, its texts, and what requests leave out."""

    info: ModelInfo
    text: SourceText
    defaults: dict[str, Any]


class TextModels:
    """The encoder-decoders of a server.

    Args:
        client: the engine.
        check_open: raises ApiError while nothing can be taken.
        answer: the one path from sources to a reply (`app.py`).
    """

    def __init__(self, client: EngineClient, check_open: Callable[[], None], answer: Answer) -> None:
        self._client = client
        self._check_open = check_open
        self._answer = answer
        self._models: dict[str, TextModel] = {}

    def add_routes(self, router: APIRouter) -> None:
        router.post("/v1/translations", summary="Translate texts")(self.translations)

    def named(self, name: str | None) -> str:
        """The encoder-decoder that a request means: by name, or the first where nothing else generates; "" for none."""
        names = [info.name for info in self._client.arrays.models.values() if info.kind == "text"]
        if name is None:
            return names[0] if names and not self._client.generates else ""
        return name if name in names else ""

    async def translations(self, body: TranslationBody, request: Request) -> Response:
        """Texts in another language. The answers are completions: one choice for each text, or n."""
        self._check_open()
        names = [info.name for info in self._client.arrays.models.values() if info.kind == "text"]
        if not names or body.model not in (None, *names):
            listed = f"its encoder-decoders are {', '.join(map(repr, names))}" if names else "it has no encoder-decoder"
            message = f"there is no model {body.model or 'for translations'!r} here; {listed}"
            raise ApiError(message, 404, param="model", code="model_not_found")
        model = await self._open(body.model or names[0])
        texts = [body.text] if isinstance(body.text, str) else body.text
        languages = body.source_language, body.target_language
        sources = await self._encode(texts, lambda: [model.text.encode(text, *languages) for text in texts])
        reply = TranslationReply(f"trans-{uuid.uuid4().hex}", model.info.name, model.text.tokenizer, None)
        return await self._start(body, model, sources, reply, request)

    async def completions(self, name: str, body: CompletionBody, request: Request) -> Response:
        """Answers to sources, which are given as prompts: texts, or token ids with all that the model expects."""
        for field, neutral in _NOT_HERE.items():
            if getattr(body, field) not in neutral:
                raise RequestError(f"{field} has no meaning for {name}, an encoder-decoder; leave it out", field)
        self._check_open()
        model = await self._open(name)
        prompts = body.prompts()
        start = model.text.encode("")[1] if any(not isinstance(prompt, str) for prompt in prompts) else []
        sources = await self._encode(
            prompts,
            lambda: [model.text.encode(prompt) if isinstance(prompt, str) else (prompt, start) for prompt in prompts],
        )
        reply = CompletionReply(f"cmpl-{uuid.uuid4().hex}", name, model.text.tokenizer, body.num_logprobs)
        return await self._start(body, model, sources, reply, request)

    async def _encode(self, texts: Sequence[str | list[int]], make: Callable[[], Sources]) -> Sources:
        """What `make` makes of `texts`, if they are not too many."""
        self._client.check_count(len(texts))
        return await in_thread_if_long(make, sum(len(text) for text in texts))

    async def _start(
        self,
        body: GenerationBody,
        model: TextModel,
        sources: Sources,
        reply: Reply,
        request: Request,
    ) -> Response:
        target = Target(model.info, model.text.tokenizer, sources[0][1])
        room = model.info.max_answer - len(target.start_ids)
        longest = min(model.defaults["max_tokens"] or room, room)
        sampling = _sampling(body, {**model.defaults, "max_tokens": longest})
        return await self._answer(body, [source for source, _ in sources], sampling, reply, request, target)

    def forget(self, name: str) -> None:
        """`name` was unloaded."""
        self._models.pop(name, None)

    async def _open(self, name: str) -> TextModel:
        if name not in self._models:
            path = str(self._client.arrays.specs[name].options["model"])
            self._models[name] = await asyncio.to_thread(_read, path, self._client.arrays.models[name])
        return self._models[name]


def _read(path: str, info: ModelInfo) -> TextModel:
    folder = ModelFolder.open(path)
    text = SourceText(folder, Tokenizer.load(folder))
    return TextModel(info, text, text.defaults())


def _sampling(body: GenerationBody, defaults: dict[str, Any]) -> SamplingParams:
    given = {name: value for name, value in body.given().items() if value is not None}
    if body.max_tokens is None:
        given.pop("max_tokens", None)
    asked = body.asked_width()
    if asked is not None:
        given["num_beams"] = asked
    return over_defaults(given, defaults)
