"""LoRA adapters over HTTP: load and unload them while serving, and who may be named as a model. Paths as in vLLM."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Response
from pydantic import Field

from fastserve.engine.client import EngineClient
from fastserve.serve.errors import ApiError
from fastserve.serve.openai import Body

AdapterName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_./:-]+$", max_length=256)]


class LoadBody(Body):
    """`lora_path` is a folder on the server's machine."""

    lora_name: AdapterName
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadBody(Body):
    lora_name: AdapterName


class AdaptersApi:
    """The adapters of one model.

    Args:
        names: what clients may call the model itself.
    """

    def __init__(self, client: EngineClient, names: frozenset[str]) -> None:
        self._client = client
        self._names = names

    def add_routes(self, router: APIRouter) -> None:
        router.post("/v1/load_lora_adapter", summary="Load a LoRA adapter")(self.load)
        router.post("/v1/unload_lora_adapter", summary="Forget a LoRA adapter")(self.unload)

    async def load(self, body: LoadBody) -> Response:
        """Make an adapter folder known; requests name it as their model from then on."""
        if body.lora_name in self._names:
            raise ApiError(f"{body.lora_name!r} is the model's own name; take another one", param="lora_name")
        await self._client.load_adapter(body.lora_name, body.lora_path)
        return _json({"status": "loaded", "lora_name": body.lora_name})

    async def unload(self, body: UnloadBody) -> Response:
        """Take no more requests for an adapter, wait for those that use it, and forget it."""
        await self._client.unload_adapter(body.lora_name)
        return _json({"status": "unloaded", "lora_name": body.lora_name})

    def find(self, name: str | None) -> str:
        """The adapter that a request's `model` names, "" for the model itself.

        Raises:
            ApiError: neither (404).
        """
        if name is None or name in self._names:
            return ""
        if name in self._client.adapters:
            return name
        raise ApiError(
            f"there is no model {name!r} here; this server has {', '.join(map(repr, self.listed()))}",
            404,
            param="model",
            code="model_not_found",
        )

    def listed(self) -> list[str]:
        """Names of the model and of its adapters, for people."""
        return [*sorted(self._names), *self._client.adapters]

    def describe(self, base: dict[str, Any]) -> list[dict[str, Any]]:
        """The adapters as entries of /v1/models, beside that of the model."""
        return [
            {**base, "id": name, "root": path, "parent": base["id"]} for name, path in self._client.adapters.items()
        ]


def _json(content: Any) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
