"""The HTTP endpoints: OpenAI's completions and chat completions, models, tokenize, health, metrics.

`create_app` builds the FastAPI app around one EngineClient and one tokenizer. Everything specific to a model is in its
arguments; the app starts and stops nothing. A request: body -> prompts -> Generation -> Reply, streamed or whole.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Receive, Scope, Send

from fastserve import __version__
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.core.arrays import ModelInfo
from fastserve.core.sampling_params import SamplingParams
from fastserve.engine.client import EngineClient, EngineState
from fastserve.serve import errors
from fastserve.serve.adapters import AdaptersApi
from fastserve.serve.admission import Admission
from fastserve.serve.array_requests import ArrayRequests
from fastserve.serve.batches import BatchesApi, BatchRunner
from fastserve.serve.completions import best_of, fill_in_prompt, without_text
from fastserve.serve.docs import render_docs
from fastserve.serve.encoders import Encoders
from fastserve.serve.errors import ApiError
from fastserve.serve.files import FILES_PATH, MAX_UPLOAD_BYTES, FilesApi, StateFolder
from fastserve.serve.generation import Answer, Generation, Generator, Target, in_thread_if_long
from fastserve.serve.kserve import KServe
from fastserve.serve.limits import ApiKeyGate, BodyLimit, HeadLimit, header_timeout
from fastserve.serve.metrics import Metrics
from fastserve.serve.openai import (
    ChatBody,
    ChatTemplateFields,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    Message,
    NamedTool,
    TokenizeBody,
    Tool,
)
from fastserve.serve.replies import ChatReply, CompletionReply, Reply
from fastserve.serve.responses import ResponsesApi
from fastserve.serve.responses_body import ResponsesBody
from fastserve.serve.stream import ClientGoneError, EventStream, while_connected
from fastserve.serve.structured import GrammarGate
from fastserve.serve.tenants import KeyRing, tenant_of
from fastserve.serve.text_models import TextModels
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
        options: AppOptions,
    ) -> None:
        self.client = client
        self.model_name = model_name
        self.metrics = Metrics(client, model_name, options.metrics_compat)
        admission = Admission(options.max_request_tokens, options.max_queued_tokens, options.keys.num_tenants > 1)
        self.generator = Generator(client, tokenizer, self.metrics, admission, options.request_timeout)
        self.tokenizer = tokenizer
        self.defaults = defaults
        self._tokenizer = tokenizer
        self.adapters = AdaptersApi(client, aliases | {model_name})
        self._style = ChatStyle.find(tokenizer.tool_template, options.tool_call_format, options.reasoning)
        self._grammars = GrammarGate()
        self._responses = ResponsesApi(self, options.response_store_bytes)
        requests = ArrayRequests(
            client, admission, self.metrics.arrays, self.generator.check_open, options.request_timeout
        )
        self.encoders = Encoders(requests)
        self.text_models = TextModels(client, self.generator.check_open, self._answer_source)
        self.kserve = KServe(requests, self._forget, options.model_repository)
        self._created = int(time.time())

    @property
    def has_chat_template(self) -> bool:
        """Whether /v1/chat/completions can be used."""
        return self._tokenizer.has_chat_template

    def router(self) -> APIRouter:
        """The routes, in the order of the documentation."""
        router = APIRouter(default_response_class=Response)
        if self.client.generates:
            router.post("/v1/chat/completions", summary="Answer a conversation")(self.chat_completions)
            self._responses.add_routes(router)
            self.adapters.add_routes(router)
        router.post("/v1/completions", summary="Continue a text")(self.completions)
        self.text_models.add_routes(router)
        self.encoders.add_routes(router)
        self.kserve.add_routes(router)
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
        name = self.adapters.find(body.model) or self.model_name
        use = self.tool_use(body.tools or [], body.tool_choice, body)
        prompt, prompt_ids = await self.encode_messages(body.messages, body, use)
        sampling = self.chat_sampling(body, prompt, use)
        reply_id = f"chatcmpl-{uuid.uuid4().hex}"
        reply = ChatReply(reply_id, name, self._tokenizer, body.num_logprobs, lambda: use.reader(prompt))
        return await self._answer(body, [prompt_ids], sampling, reply, request)

    async def completions(self, body: CompletionBody, request: Request) -> Response:
        """OpenAI's completions, with vLLM's extra sampling fields."""
        other = self.text_models.named(body.model)
        if other:
            return await self.text_models.completions(other, body, request)
        if not self.client.generates:
            raise ApiError("no model of this server generates text", 404, param="model", code="model_not_found")
        name = self.adapters.find(body.model) or self.model_name
        self.generator.check_open()
        texts, sampling = body.prompts(), body.sampling_params(self.defaults)
        self.client.check_count(len(texts) * max(sampling.n, sampling.num_beams))
        size = sum(len(prompt) + len(body.suffix or "") for prompt in texts)
        prompts = await in_thread_if_long(lambda: [self._encode_prompt(prompt, body) for prompt in texts], size)
        echoed = None
        if body.echo:
            echoed = [prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt) for prompt in texts]
        reply_id = f"cmpl-{uuid.uuid4().hex}"
        reply = CompletionReply(reply_id, name, self._tokenizer, body.num_logprobs, echoed)

        def choose(answers: list[Answer]) -> list[Answer]:
            if body.num_candidates > body.num_choices:
                answers = best_of(answers, body.num_choices)
            return without_text(answers) if body.max_tokens == 0 else answers

        return await self._answer(body, prompts, sampling, reply, request, choose)

    def _encode_prompt(self, prompt: str | list[int], body: CompletionBody) -> list[int]:
        if body.suffix:
            return fill_in_prompt(self._tokenizer, prompt, body.suffix)
        return self.generator.token_ids(prompt, body.add_special_tokens) if isinstance(prompt, str) else prompt

    async def _answer(
        self,
        body: GenerationBody,
        prompts: list[list[int]],
        sampling: SamplingParams,
        reply: Reply,
        request: Request,
        choose: Callable[[list[Answer]], list[Answer]] | None = None,
        target: Target | None = None,
    ) -> Response:
        """`choose` makes the answers that are shown of those that were made."""
        generation = await self.start(reply.id, body, prompts, sampling, request, target)
        headers = {"X-Request-Id": reply.id}
        if body.stream:
            return EventStream(_events(generation, reply, body), generation.close, headers)
        try:
            answers = await while_connected(request.receive, generation.collect())
        except ClientGoneError:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        finally:
            generation.close()
        shown = answers if choose is None else choose(answers)
        return Response(reply.whole(shown, generation.usage), headers=headers, media_type="application/json")

    async def _answer_source(
        self,
        body: GenerationBody,
        sources: list[list[int]],
        sampling: SamplingParams,
        reply: Reply,
        request: Request,
        target: Target,
    ) -> Response:
        return await self._answer(body, sources, sampling, reply, request, target=target)

    def _forget(self, name: str) -> None:
        self.encoders.forget(name)
        self.text_models.forget(name)

    async def start(
        self,
        name: str,
        body: GenerationBody,
        prompts: list[list[int]],
        sampling: SamplingParams,
        request: Request,
        target: Target | None = None,
    ) -> Generation:
        """Start what a body asks for, on the account of the one who asks and within the time that they give.

        Raises:
            FastServeError: see `Generator.start` and `GrammarGate.check`.
        """
        await self._grammars.check(sampling.structured_outputs)
        seconds = [item for item in (body.timeout, header_timeout(request)) if item is not None]
        return self.generator.start(
            name,
            prompts,
            sampling,
            body.priority,
            tenant=tenant_of(request),
            adapter="" if target is not None else self.adapters.find(body.model),
            seconds=min(seconds, default=None),
            target=target,
            all_score=bool(body.stream),
        )

    async def models(self) -> Response:
        """The models that are served; the one that generates and its adapters come first."""
        own = self._describe_models() if self.client.generates else []
        return _json({"object": "list", "data": [*own, *map(self._describe_other, self.client.arrays.models.values())]})

    async def model(self, model: str) -> Response:
        """The model of this name."""
        if model in self.client.arrays.models:
            return _json(self._describe_other(self.client.arrays.models[model]))
        name = self.adapters.find(model) or self.model_name
        return _json(next(entry for entry in self._describe_models() if entry["id"] == name))

    async def tokenize(self, body: TokenizeBody) -> Response:
        """Token ids of a text, or of messages put through the chat template."""
        self.adapters.find(body.model)
        self.generator.check_open()
        if body.messages is not None:
            _, token_ids = await self.encode_messages(body.messages, body)
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
        self.adapters.find(body.model)
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

    def _describe_models(self) -> list[dict[str, Any]]:
        ready = self.client.ready
        model = {
            "id": self.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "fastserve",
            "max_model_len": None if ready is None else ready.max_model_len,
        }
        return [model, *self.adapters.describe(model)]

    def _describe_other(self, info: ModelInfo) -> dict[str, Any]:
        described = {"id": info.name, "object": "model", "created": self._created, "owned_by": "fastserve"}
        return {**described, "max_model_len": info.max_len or None, "kind": info.kind}

    def tool_use(
        self, tools: Sequence[Tool], choice: str | NamedTool | None, body: ChatBody | ResponsesBody
    ) -> ToolUse:
        """What the tools of a request mean for its prompt and its answer. Raises RequestError, see `ToolUse.of`."""
        has_form = body.wanted_structure() is not None
        return ToolUse.of(self._style, tools, choice, is_single=body.parallel_tool_calls is False, has_form=has_form)

    def chat_sampling(self, body: GenerationBody, prompt: str, use: ToolUse | None = None) -> SamplingParams:
        """How the answer to a conversation is sampled: a form of it begins after the model's thoughts.

        Raises:
            RequestError: a value is out of its range.
        """
        use = use or ToolUse.none(self._style)
        sampling = body.sampling_params(self.defaults)
        wanted = use.structure() or sampling.structured_outputs
        if wanted is not None:
            sampling = replace(sampling, structured_outputs=replace(wanted, begins_after=use.begins_after(prompt)))
        if use.needs_special_tokens(self._tokenizer):
            sampling = replace(sampling, skip_special_tokens=False)
        return sampling

    async def encode_messages(
        self, messages: list[Message], body: ChatTemplateFields, use: ToolUse | None = None
    ) -> tuple[str, list[int]]:
        """The prompt of a conversation, and its token ids."""
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


@dataclass(frozen=True, slots=True)
class AppOptions:
    """What the app is told about itself; see `core/config.py:ServeConfig` for the meaning of each.

    Attributes:
        keys: asked of every request but /health; an empty ring asks for none.
    """

    keys: KeyRing = field(default_factory=lambda: KeyRing({}))
    max_body_bytes: int = 8 * 1024 * 1024
    max_request_tokens: int = 0
    max_queued_tokens: int = 0
    request_timeout: float = 0.0
    response_store_bytes: int = 64 * 1024 * 1024
    state_folder: str = ""
    model_repository: str = ""
    max_state_bytes: int = 1024 * 1024 * 1024
    metrics_compat: str = "none"
    tool_call_format: str = "auto"
    reasoning: str = "auto"


def create_app(
    client: EngineClient,
    tokenizer: Tokenizer,
    *,
    model_name: str,
    aliases: frozenset[str] = frozenset(),
    defaults: Mapping[str, Any] | None = None,
    options: AppOptions | None = None,
) -> Application:
    """The app for one model.

    Args:
        aliases: other names that clients may use for the model.
        defaults: SamplingParams fields for requests that leave them out.
    """
    options = options or AppOptions()
    api = Api(client, tokenizer, model_name, aliases, dict(defaults or {}), options)
    inner = FastAPI(title="FastServe", version=__version__, docs_url=None, redoc_url=None)
    errors.install(inner)
    state = StateFolder.open(options.state_folder, options.max_state_bytes) if options.state_folder else None
    batches = BatchRunner(inner, state, max(1, client.config.max_batch_sequences // 2))
    router = api.router()
    FilesApi(state).add_routes(router)
    BatchesApi(state, batches).add_routes(router)
    inner.include_router(router)

    @inner.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(render_docs(inner.openapi()))

    uploads = {FILES_PATH: MAX_UPLOAD_BYTES} if state is not None else {}
    guarded = BodyLimit(inner, max_bytes=options.max_body_bytes, more_bytes=uploads)
    return Application(api, batches, HeadLimit(ApiKeyGate(guarded, options.keys)))


class Application:
    """What a web server runs: the endpoints behind their guards.

    Attributes:
        api: the endpoints of the model.
        batches: what works off batch files; the one who serves starts and closes it.
    """

    def __init__(self, api: Api, batches: BatchRunner, guarded: ASGIApp) -> None:
        self.api = api
        self.batches = batches
        self._guarded = guarded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._guarded(scope, receive, send)


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
