"""The Open Inference Protocol (KServe v2): metadata, readiness, tensors in and out, as JSON or binary; and loading and
unloading of models in Triton's form.

Serves the user's own networks (`fastserve.Servable`). Errors are `{"error": "..."}`, as the protocol has them. A body
with binary tensors is its JSON, whose length is in a header, and then the tensors' bytes in their order.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import numpy as np
from fastapi import APIRouter, Request, Response

from fastserve import __version__
from fastserve.core.arrays import Array, ArrayRequest, ModelInfo, TensorRequest, TensorSpec
from fastserve.core.config import EngineConfig
from fastserve.core.errors import FastServeError, RequestError
from fastserve.engine.array_codec import join_bytes, split_bytes
from fastserve.engine.client import EngineState
from fastserve.serve.array_requests import ArrayRequests
from fastserve.serve.errors import ApiError, as_api_error
from fastserve.serve.models import repository_spec
from fastserve.serve.tenants import tenant_of

JSON_LENGTH = "Inference-Header-Content-Length"
_EXTENSIONS = ["binary_tensor_data", "model_repository"]
_MAX_RANK = 16
_DATATYPES = {
    "BOOL": "bool",
    **{f"UINT{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "BYTES": "bytes",
}
_NAMES = {dtype: name for name, dtype in _DATATYPES.items()}


class InputTensor(msgspec.Struct):
    """A tensor of a request: its data here, or `parameters.binary_data_size` bytes after the JSON."""

    name: str
    shape: list[int]
    datatype: str
    data: list[Any] | None = None
    parameters: dict[str, Any] = {}


class OutputWish(msgspec.Struct):
    """An output that is asked for."""

    name: str
    parameters: dict[str, Any] = {}


class InferBody(msgspec.Struct):
    """The JSON of a request."""

    inputs: list[InputTensor]
    id: str = ""
    outputs: list[OutputWish] = []
    parameters: dict[str, Any] = {}


class LoadParameters(msgspec.Struct):
    config: str | None = None


class LoadBody(msgspec.Struct):
    """The JSON of a load; `parameters.config` is JSON of engine options in a text, as in Triton."""

    parameters: LoadParameters | None = None


class KServe:
    """The endpoints below /v2.

    Args:
        requests: the way to the engine.
        on_unload: told the name of a model that is no more.
        repository: folder that models may be loaded from; "": none.
    """

    def __init__(self, requests: ArrayRequests, on_unload: Callable[[str], None], repository: str) -> None:
        self._requests = requests
        self._client = requests.client
        self._on_unload = on_unload
        self._repository = repository

    def add_routes(self, router: APIRouter) -> None:
        """The routes, in the order of the protocol."""
        router.get("/v2", summary="The server's name, version and extensions")(self.server)
        router.get("/v2/health/live", summary="200 while the server process lives")(self.live)
        router.get("/v2/health/ready", summary="200 while requests can be answered")(self.ready)
        for path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
            router.get(path, summary="A model's inputs and outputs")(_guarded(self.metadata))
            router.get(path + "/ready", summary="200 when the model can be asked")(_guarded(self.model_ready))
            router.post(path + "/infer", summary="Tensors in, tensors out")(_guarded(self.infer))
        router.post("/v2/repository/index", summary="The models that are loaded")(_guarded(self.index))
        for verb, handle in (("load", self.load), ("unload", self.unload)):
            path = f"/v2/repository/models/{{name}}/{verb}"
            router.post(path, summary=f"{verb.capitalize()} a model of the repository")(_guarded(handle))

    async def server(self) -> Response:
        """Server metadata."""
        return _json({"name": "fastserve", "version": __version__, "extensions": _EXTENSIONS})

    async def live(self) -> Response:
        """The server process lives."""
        return Response()

    async def ready(self) -> Response:
        """Requests can be answered."""
        return Response(status_code=200 if self._client.state is EngineState.READY else 503)

    async def metadata(self, request: Request) -> Response:
        """Names, types and shapes of a model's tensors."""
        info = self._info(request)
        described = {"name": info.name, "versions": ["1"], "platform": f"fastserve_{info.kind}"}
        tensors = {"inputs": _tensors(info.inputs), "outputs": _tensors(info.outputs)}
        return _json({**described, **tensors})

    async def model_ready(self, request: Request) -> Response:
        """The model is loaded."""
        self._info(request)
        return Response(status_code=200 if self._client.state is EngineState.READY else 503)

    async def infer(self, request: Request) -> Response:
        """One request; it may be joined with others of its time."""
        self._requests.check_open()
        info = self._info(request)
        if info.kind != "tensors":
            raise ApiError(f"{info.name} takes text, not tensors; see /docs for its endpoint", 400)
        body, tail = _read_body(await request.body(), request.headers.get(JSON_LENGTH))
        arrays = _read_tensors(body.inputs, tail)
        names = [wish.name for wish in body.outputs] or list(info.outputs)
        if unknown := set(names) - set(info.outputs):
            raise RequestError(
                f"{info.name} has no output {', '.join(sorted(unknown))}; it has {', '.join(info.outputs)}"
            )
        name = f"infer-{uuid.uuid4().hex}"
        asked: list[ArrayRequest] = [
            TensorRequest(name, info.name, arrays, time.monotonic(), tenant=tenant_of(request))
        ]
        [output] = await self._requests.run(request, asked, cost=0)
        wishes = {wish.name: wish.parameters for wish in body.outputs}
        all_binary = body.parameters.get("binary_data_output") is True
        binary = {item for item in names if wishes.get(item, {}).get("binary_data", all_binary) is True}
        head = {"model_name": info.name, "model_version": "1", **({"id": body.id} if body.id else {})}
        return _write_tensors(head, {item: output.arrays[item] for item in names}, binary)

    async def index(self, request: Request) -> Response:
        """Every model, the one that generates left out."""
        return _json([{"name": name, "version": "1", "state": "READY"} for name in self._client.arrays.models])

    async def load(self, request: Request) -> Response:
        """Load a folder of the model repository by its name."""
        self._requests.check_open()
        body = msgspec.json.decode(await request.body() or b"{}", type=LoadBody)
        config = None if body.parameters is None else body.parameters.config
        options = msgspec.json.decode(config or "{}", type=dict[str, Any])
        base: EngineConfig = self._client.config
        await self._client.arrays.load(repository_spec(self._repository, request.path_params["name"], base, options))
        return _json({})

    async def unload(self, request: Request) -> Response:
        """Forget a model; what waits for it fails."""
        name = self._info(request).name
        if not self._repository:
            repository_spec("", name, self._client.config, {})  # raises: nothing is loaded or unloaded here
        self._client.unload(name)
        self._on_unload(name)
        return _json({})

    def _info(self, request: Request) -> ModelInfo:
        name, version = request.path_params["name"], request.path_params.get("version", "1")
        info = self._client.arrays.models.get(name)
        if info is None or version != "1":
            known = ", ".join(self._client.arrays.models) or "none"
            raise ApiError(f"there is no model {name!r} of version {version} here; models with tensors: {known}", 404)
        return info


def _guarded(handle: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Errors in the protocol's form."""

    async def guarded(request: Request) -> Response:
        try:
            return await handle(request)
        except msgspec.DecodeError as error:
            known = ApiError(f"the body cannot be read: {error}", 400)
        except FastServeError as error:
            known = as_api_error(error)
        return Response(msgspec.json.encode({"error": str(known)}), known.http_status, media_type="application/json")

    return guarded


def _read_body(content: bytes, json_length: str | None) -> tuple[InferBody, bytes]:
    """The JSON, and the binary tensors that follow it."""
    length = len(content)
    if json_length is not None:
        if not json_length.isdecimal() or int(json_length) > len(content):
            raise RequestError(f"{JSON_LENGTH} must be at most the body's length, {len(content)}")
        length = int(json_length)
    return msgspec.json.decode(content[:length], type=InferBody), content[length:]


def _read_tensors(tensors: list[InputTensor], tail: bytes) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    start = 0
    for tensor in tensors:
        dtype = _DATATYPES.get(tensor.datatype)
        if dtype is None:
            raise RequestError(f"{tensor.name} has datatype {tensor.datatype!r}; known: {', '.join(_DATATYPES)}")
        is_shape = len(tensor.shape) <= _MAX_RANK and all(0 <= size < 2**31 for size in tensor.shape)
        if tensor.name in arrays or not is_shape:
            raise RequestError(f"{tensor.name} comes twice, or has a shape that cannot be: {tensor.shape}")
        size = tensor.parameters.get("binary_data_size")
        if size is None:
            data = _from_json(tensor, dtype)
        elif isinstance(size, int) and 0 <= size <= len(tail) - start:
            data = tail[start : start + size]
            start += size
        else:
            raise RequestError(f"{tensor.name} says binary_data_size {size!r}, which the body does not have")
        arrays[tensor.name] = Array(dtype, tensor.shape, data)
    if start != len(tail):
        raise RequestError(f"{len(tail) - start} bytes follow the last tensor")
    return arrays


def _from_json(tensor: InputTensor, dtype: str) -> bytes:
    """Data that is in the JSON, flat or nested."""
    values = tensor.data
    while isinstance(values, list) and values and isinstance(values[0], list):
        if not all(isinstance(item, list) for item in values):
            raise RequestError(f"{tensor.name} has lists of different depths")
        values = [inner for item in values for inner in item]
    if values is None:
        raise RequestError(f"{tensor.name} has no data")
    kinds: tuple[type, ...] = (str,) if dtype == "bytes" else (bool,) if dtype == "bool" else (int, float)
    if not all(isinstance(value, kinds) and (dtype == "bool" or not isinstance(value, bool)) for value in values):
        raise RequestError(f"{tensor.name} has data that is not of {tensor.datatype}")
    if dtype == "bytes":
        return join_bytes(values)
    try:
        if dtype.startswith(("int", "uint")) and any(isinstance(value, float) for value in values):
            raise ValueError("fractions")
        return np.array(values, dtype=dtype).tobytes()
    except (OverflowError, ValueError) as error:
        raise RequestError(f"{tensor.name} has data that is not of {tensor.datatype}: {error}") from error


def _write_tensors(head: dict[str, Any], arrays: dict[str, Array], binary: set[str]) -> Response:
    outputs, tail = [], []
    for name, array in arrays.items():
        described: dict[str, Any] = {"name": name, "shape": array.shape, "datatype": _NAMES[array.dtype]}
        if name in binary:
            described["parameters"] = {"binary_data_size": len(array.data)}
            tail.append(array.data)
        elif array.dtype == "bytes":
            described["data"] = [item.decode("utf-8", "replace") for item in split_bytes(array.data)]
        else:
            described["data"] = np.frombuffer(array.data, dtype=array.dtype).tolist()
        outputs.append(described)
    content = msgspec.json.encode({**head, "outputs": outputs})
    if not tail:
        return Response(content, media_type="application/json")
    headers = {JSON_LENGTH: str(len(content))}
    return Response(b"".join([content, *tail]), headers=headers, media_type="application/octet-stream")


def _tensors(specs: dict[str, TensorSpec]) -> list[dict[str, Any]]:
    return [{"name": name, "datatype": _NAMES[spec.dtype], "shape": spec.shape} for name, spec in specs.items()]


def _json(content: Any) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
