"""The HTTP endpoints: OpenAI's completions and chat completions, models, tokenize, health, metrics.

`create_app` builds the FastAPI app around one EngineClient and one tokenizer. Everything specific to a model is in its
arguments; the app starts and stops nothing. A request: body -> prompts -> Generation -> Reply, streamed or whole.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST

from fastserve import __version__
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.core.sampling_params import SamplingParams
from fastserve.engine.client import EngineClient, EngineState
from fastserve.serve import errors
from fastserve.serve.docs import render_docs
from fastserve.serve.errors import ApiError
from fastserve.serve.generation import Generation, Generator
from fastserve.serve.limits import ApiKeyGate, BodyLimit
from fastserve.serve.metrics import Metrics
from fastserve.serve.openai import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    Message,
    TokenizeBody,
)
from fastserve.serve.replies import ChatReply, CompletionReply, Reply
from fastserve.serve.stream import ClientGoneError, EventStream, while_connected
from fastserve.serve.structured import GrammarGate
from fastserve.serve.tools import ChatStyle, ToolUse

_CLIENT_CLOSED_REQUEST = 499


class Api:
    """One model behind the endpoints.

    Attributes:
        generator: starts generations; its `is_draining` closes the door.
    """

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        model_name: str,
        aliases: frozenset[str],
        defaults: dict[str, Any],
        style: ChatStyle,
    ) -> None:
        self.client = client
        self.model_name = model_name
        self.metrics = Metrics(client, model_name)
        self.generator = Generator(client, tokenizer, self.metrics)
        self._tokenizer = tokenizer
        self._names = aliases | {model_name}
        self._defaults = defaults
        self._style = style
        self._grammars = GrammarGate()
        self._created = int(time.time())

    @property
    def has_chat_template(self) -> bool:
        """Whether /v1/chat/completions can be used."""
        return self._tokenizer.has_chat_template

    def router(self) -> APIRouter:
        """The routes, in the order of the documentation."""
        router = APIRouter(default_response_class=Response)
        router.post("/v1/chat/completions", summary="Answer a conversation")(self.chat_completions)
        router.post("/v1/completions", summary="Continue a text")(self.completions)
        router.get("/v1/models", summary="List the models")(self.models)
        router.get("/v1/models/{model:path}", summary="Describe a model")(self.model)
        router.post("/tokenize", summary="Text or messages to token ids")(self.tokenize)
        router.post("/detokenize", summary="Token ids to text")(self.detokenize)
        router.get("/health", summary="200 while the server process lives")(self.health)
        router.get("/ready", summary="200 while requests can be answered, else 503 with the reason")(self.ready)
        router.get("/metrics", summary="Prometheus metrics")(self.export_metrics)
        router.get("/version", summary="The version of FastServe")(self.version)
        return router

    async def chat_completions(self, body: ChatBody, request: Request) -> Response:
        """OpenAI's chat completions, with vLLM's extra sampling fields."""
        self._check_model(body.model)
        use = ToolUse.of(body, self._style)
        prompt, prompt_ids = await self._encode_messages(body.messages, body, use)
        sampling = body.sampling_params(self._defaults)
        wanted = use.structure() or sampling.structured_outputs
        if wanted is not None:
            sampling = replace(sampling, structured_outputs=replace(wanted, begins_after=use.begins_after(prompt)))
        if use.needs_special_tokens(self._tokenizer):
            sampling = replace(sampling, skip_special_tokens=False)
        reply_id = f"chatcmpl-{uuid.uuid4().hex}"
        reply = ChatReply(reply_id, self.model_name, self._tokenizer, body.num_logprobs, lambda: use.reader(prompt))
        return await self._answer(body, [prompt_ids], sampling, reply, request)

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """OpenAI's completions, with vLLM's extra sampling fields."""
        self._check_model(body.model)
        self.generator.check_open()
        prompts = [
            await self.generator.encode(prompt, body.add_special_tokens) if isinstance(prompt, str) else prompt
            for prompt in body.prompts()
        ]
        reply_id = f"cmpl-{uuid.uuid4().hex}"
        reply = CompletionReply(reply_id, self.model_name, self._tokenizer, body.num_logprobs)
        return await self._answer(body, prompts, body.sampling_params(self._defaults), reply, request)

    async def _answer(
        self, body: GenerationBody, prompts: list[list[int]], sampling: SamplingParams, reply: Reply, request: Request
    ) -> Response:
        await self._grammars.check(sampling.structured_outputs)
        generation = self.generator.start(reply.id, prompts, sampling, body.priority)
        headers = {"X-Request-Id": reply.id}
        if body.stream:
            return EventStream(_events(generation, reply, body), generation.close, headers)
        try:
            answers = await while_connected(request.receive, generation.collect())
        except ClientGoneError:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        finally:
            generation.close()
        return Response(reply.whole(answers, generation.usage), headers=headers, media_type="application/json")

    async def models(self) -> Response:
        """The one model that is served."""
        return _json({"object": "list", "data": [self._describe_model()]})

    async def model(self, model: str) -> Response:
        """The model of this name."""
        self._check_model(model)
        return _json(self._describe_model())

    async def tokenize(self, body: TokenizeBody) -> Response:
        """Token ids of a text, or of messages put through the chat template."""
        self._check_model(body.model)
        self.generator.check_open()
        if body.messages is not None:
            _, token_ids = await self._encode_messages(body.messages, body)
        else:
            token_ids = await self.generator.encode(body.prompt or "", body.add_special_tokens)
        reply: dict[str, Any] = {
            "count": len(token_ids),
            "max_model_len": self.generator.max_model_len,
            "tokens": token_ids,
        }
        if body.return_token_strs:
            reply["token_strs"] = [self._tokenizer.token_text(token_id) for token_id in token_ids]
        return _json(reply)

    async def detokenize(self, body: DetokenizeBody) -> Response:
        """Text of token ids."""
        self._check_model(body.model)
        return _json({"prompt": self._tokenizer.decode(body.tokens, skip_special_tokens=False)})

    async def health(self) -> Response:
        """The server process lives; says nothing about the engine (see /ready)."""
        return _json({"status": "ok"})

    async def ready(self) -> Response:
        """Whether requests can be answered now."""
        if self.generator.is_draining:
            reason = "draining"
        elif self.client.state is not EngineState.READY:
            reason = f"engine {self.client.state}"
        else:
            return _json({"status": "ready"})
        return Response(
            msgspec.json.encode({"status": "not ready", "reason": reason}), 503, media_type="application/json"
        )

    async def export_metrics(self) -> Response:
        """Metrics in Prometheus' text form."""
        return Response(self.metrics.export(), media_type=CONTENT_TYPE_LATEST)

    async def version(self) -> Response:
        """The version of FastServe."""
        return _json({"version": __version__})

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self._names:
            raise ApiError(
                f"there is no model {name!r} here; this server has {self.model_name!r}",
                404,
                param="model",
                code="model_not_found",
            )

    def _describe_model(self) -> dict[str, Any]:
        ready = self.client.ready
        return {
            "id": self.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "fastserve",
            "max_model_len": None if ready is None else ready.max_model_len,
        }

    async def _encode_messages(
        self, messages: list[Message], body: ChatBody | TokenizeBody, use: ToolUse | None = None
    ) -> tuple[str, list[int]]:
        """The prompt, and its token ids."""
        self.generator.check_open()
        prepared, tools = [message.for_template() for message in messages], None
        if use is not None:
            prepared, tools = use.for_template(prepared)
        text = self._tokenizer.render_chat(
            prepared,
            tools=tools,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            variables=body.chat_template_kwargs,
        )
        return text, await self.generator.encode(text, add_special_tokens=False)


def create_app(
    client: EngineClient,
    tokenizer: Tokenizer,
    *,
    model_name: str,
    aliases: frozenset[str] = frozenset(),
    defaults: Mapping[str, Any] | None = None,
    api_key: str = "",
    max_body_bytes: int = 8 * 1024 * 1024,
    tool_call_format: str = "auto",
    reasoning: str = "auto",
) -> FastAPI:
    """The app for one model. `app.state.api` is its Api.

    Args:
        aliases: other names that clients may use for the model.
        defaults: SamplingParams fields for requests that leave them out.
        api_key: asked of every request but /health; "" asks for none.
        tool_call_format, reasoning: see ServeConfig.
    """
    style = ChatStyle.find(tokenizer.tool_template, tool_call_format, reasoning)
    api = Api(client, tokenizer, model_name, aliases, dict(defaults or {}), style)
    app = FastAPI(title="FastServe", version=__version__, docs_url=None, redoc_url=None)
    app.state.api = api
    app.include_router(api.router())
    errors.install(app)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(render_docs(app.openapi()))

    app.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    if api_key:
        app.add_middleware(ApiKeyGate, api_key=api_key)
    return app


async def _events(generation: Generation, reply: Reply, body: GenerationBody) -> AsyncGenerator[bytes, None]:
    running = body.wants_running_usage
    async for delta in generation.deltas():
        usage = generation.usage if running else None
        event = reply.chunk(delta, usage)
        event = reply.first_chunk(delta.choice, usage) + event if delta.is_first else event
        if event:
            yield event
    if body.wants_usage:
        yield reply.usage_chunk(generation.usage)


def _json(content: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(content), status, media_type="application/json")
