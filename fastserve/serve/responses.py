"""OpenAI's responses: /v1/responses and what can be done with a response by its id.

A response is one turn of a conversation. It is kept in memory (`response_store.py`), so that the next turn may name it
as `previous_response_id`; with `background` it is made while nobody waits, and can be cancelled.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import APIRouter, Request, Response

from fastserve.serve.errors import ApiError, as_api_error
from fastserve.serve.generation import Generation
from fastserve.serve.openai import Message
from fastserve.serve.response_store import ResponseStore, StoredResponse, page
from fastserve.serve.responses_body import ResponsesBody, messages_of
from fastserve.serve.responses_reply import ResponseReply
from fastserve.serve.stream import ClientGoneError, EventStream, while_connected
from fastserve.serve.tenants import tenant_of

if TYPE_CHECKING:
    from fastserve.serve.app import Api

_CLIENT_CLOSED_REQUEST = 499


class ResponsesApi:
    """The endpoints.

    Args:
        api: the model behind them.
        max_store_bytes: memory for stored responses; 0 stores none.
    """

    def __init__(self, api: Api, max_store_bytes: int) -> None:
        self._api = api
        self.store = ResponseStore(max_store_bytes)
        self._background: dict[str, asyncio.Task[None]] = {}

    def add_routes(self, router: APIRouter) -> None:
        router.post("/v1/responses", summary="Answer one turn of a conversation")(self.create)
        router.get("/v1/responses/{response_id}", summary="A stored response")(self.get)
        router.delete("/v1/responses/{response_id}", summary="Forget a response")(self.delete)
        router.post("/v1/responses/{response_id}/cancel", summary="Stop a background response")(self.cancel)
        router.get("/v1/responses/{response_id}/input_items", summary="The input of a response")(self.input_items)

    async def create(self, body: ResponsesBody, request: Request) -> Response:
        """OpenAI's responses, for text and functions."""
        name = self._api.adapters.find(body.model) or self._api.model_name
        if body.background and not self.store.max_bytes:
            raise ApiError("this server stores no responses (response_store_bytes), so none can be background", 400)
        tenant = tenant_of(request)
        items = body.items()
        history = self._history(body.previous_response_id, tenant) + items
        use = self._api.tool_use(body.chat_tools(), body.chat_tool_choice(), body)
        prompt, prompt_ids = await self._api.encode_messages(_messages(body.instructions, history), body, use)
        sampling = self._api.chat_sampling(body, prompt, use)
        reply = ResponseReply(body, name, self._api.tokenizer, sampling, use.reader(prompt))
        stored = StoredResponse(tenant, reply.body, _listed(items), history)
        generation = await self._api.start(reply.id, body, [prompt_ids], sampling, request)
        headers = {"X-Request-Id": reply.id}
        if body.background:
            self._run_in_background(generation, reply, stored)
            return _json(reply.body)
        if body.stream:
            return EventStream(self._events(generation, reply, stored), generation.close, headers, done=b"")
        try:
            await while_connected(request.receive, self._run(generation, reply, stored))
        except ClientGoneError:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        finally:
            generation.close()
        return Response(msgspec.json.encode(reply.body), headers=headers, media_type="application/json")

    async def get(self, response_id: str, request: Request, stream: bool = False) -> Response:
        """A response in its present state."""
        if stream:
            raise ApiError("a stored response is not streamed; leave out stream", param="stream")
        return _json(self.store.get(response_id, tenant_of(request)).body)

    async def delete(self, response_id: str, request: Request) -> Response:
        """Forget a response; one that is being made is stopped."""
        self.store.delete(response_id, tenant_of(request))
        if task := self._background.get(response_id):
            task.cancel()
        return _json({"id": response_id, "object": "response", "deleted": True})

    async def cancel(self, response_id: str, request: Request) -> Response:
        """Stop a background response; one that has ended stays as it is."""
        stored = self.store.get(response_id, tenant_of(request))
        if not stored.body["background"]:
            raise ApiError("only a response with background: true can be cancelled; close the connection of others")
        if task := self._background.get(response_id):
            task.cancel()
            await asyncio.wait([task])
        return _json(stored.body)

    async def input_items(
        self, response_id: str, request: Request, after: str | None = None, limit: int = 20, order: str = "desc"
    ) -> Response:
        """The items of the turn's input."""
        if order not in ("asc", "desc"):
            raise ApiError("order must be asc or desc", param="order")
        items = self.store.get(response_id, tenant_of(request)).items
        return _json(page(items if order == "asc" else items[::-1], after, limit))

    def _history(self, response_id: str | None, tenant: str) -> list[dict[str, Any]]:
        if response_id is None:
            return []
        previous = self.store.get(response_id, tenant, "previous_response_id")
        if previous.body["status"] not in ("completed", "incomplete"):
            raise ApiError(
                f"the response {response_id!r} is {previous.body['status']}, so that nothing can follow it",
                param="previous_response_id",
            )
        return [*previous.history, *previous.body["output"]]

    async def _run(self, generation: Generation, reply: ResponseReply, stored: StoredResponse) -> None:
        async for delta in generation.deltas():
            for _ in reply.take(delta):
                pass  # nobody reads the events
        for _ in reply.finish(generation):
            pass
        self._keep(stored)

    async def _events(
        self, generation: Generation, reply: ResponseReply, stored: StoredResponse
    ) -> AsyncGenerator[bytes, None]:
        for event in reply.opening():
            yield reply.encode(event)
        try:
            async for delta in generation.deltas():
                if data := b"".join(map(reply.encode, reply.take(delta))):
                    yield data
            ending = list(map(reply.encode, reply.finish(generation)))
        except Exception as error:
            ending = list(map(reply.encode, reply.fail(as_api_error(error))))
        self._keep(stored)
        for data in ending:
            yield data

    def _run_in_background(self, generation: Generation, reply: ResponseReply, stored: StoredResponse) -> None:
        async def run() -> None:
            reply.body["status"] = "in_progress"
            try:
                await self._run(generation, reply, stored)
            except asyncio.CancelledError:
                reply.cancel()
            except Exception as error:
                for _ in reply.fail(as_api_error(error)):
                    pass
            finally:
                generation.close()

        def end(_: asyncio.Task[None]) -> None:
            generation.close()  # also when it was cancelled before it began
            del self._background[reply.id]
            if reply.body["status"] == "queued":
                reply.cancel()

        try:
            self._keep(stored)
        except BaseException:
            generation.close()
            raise
        task = self._background[reply.id] = asyncio.create_task(run(), name="background response")
        task.add_done_callback(end)

    def _keep(self, stored: StoredResponse) -> None:
        """A deleted background response does not come back."""
        is_background = stored.body["background"]
        if stored.body["store"] and (not is_background or stored.body["status"] == "queued" or self._has(stored)):
            self.store.put(stored)

    def _has(self, stored: StoredResponse) -> bool:
        try:
            return self.store.get(stored.body["id"], stored.tenant) is stored
        except ApiError:
            return False


def _messages(instructions: str | None, history: list[dict[str, Any]]) -> list[Message]:
    messages = messages_of(history)
    return [Message(role="developer", content=instructions), *messages] if instructions else messages


def _listed(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items of the input with what every listed item has: an id, a status, texts as parts."""
    listed = []
    for item in items:
        made = {"id": f"item_{uuid.uuid4().hex}", "status": "completed", **item}
        if item["type"] == "message" and isinstance(item["content"], str):
            made["content"] = [{"type": "text", "text": item["content"]}]
        if item["type"] == "message":
            made["content"] = [_listed_text(item["role"], part["text"]) for part in made["content"]]
        listed.append(made)
    return listed


def _listed_text(role: str, text: str) -> dict[str, Any]:
    if role == "assistant":
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "input_text", "text": text}


def _json(content: Any) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
