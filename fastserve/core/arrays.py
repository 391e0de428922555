"""Requests that are answered once, with arrays: an encoder's scores and vectors, a user's own network's outputs.

The counterpart of `request.py` for networks that do not generate. These structs cross the process boundary as msgpack
frames; an array is its bytes. Text, labels and spans exist above the client only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from fastserve.core.errors import RequestError

# What a PoolingRequest asks of an encoder: its head's scores, one vector for the text, or every token's hidden state.
HEADS = ("scores", "embed", "hidden")


class Array(msgspec.Struct, frozen=True, array_like=True):
    """A dense array: `dtype` as numpy names it (float32, int64, bool, ...) or "bytes"; row-major `data`.

    The elements of "bytes" are byte strings of any length, each behind its length in four little-endian bytes.
    """

    dtype: str
    shape: list[int]
    data: bytes


class PoolingRequest(msgspec.Struct, frozen=True, tag=True):
    """One sequence for an encoder.

    Attributes:
        request_id: unique among live requests.
        model: name of the model.
        input_ids: token ids, special tokens included; at least one.
        type_ids: token types, as many; empty: all 0.
        head: one of HEADS.
        rows: places in input_ids that scores are wanted of; empty: all. Only for heads that read every token.
        arrival_time, priority, tenant: as in `Request`.
    """

    request_id: str
    model: str
    input_ids: list[int]
    type_ids: list[int] = []
    head: str = "scores"
    rows: list[int] = []
    arrival_time: float = 0.0
    priority: int = 0
    tenant: str = ""


class TensorRequest(msgspec.Struct, frozen=True, tag=True):
    """Inputs for a user's own network, by name; sizes along its batch axis are equal."""

    request_id: str
    model: str
    inputs: dict[str, Array]
    arrival_time: float = 0.0
    priority: int = 0
    tenant: str = ""


ArrayRequest = PoolingRequest | TensorRequest


class ArrayOutput(msgspec.Struct, array_like=True):
    """The answer to one request: arrays by name ("" for an encoder's only one), or a message for the user.

    `is_refused` tells a request that cannot be served as asked from a failure of ours.
    """

    request_id: str
    arrays: dict[str, Array] = {}
    error: str | None = None
    is_refused: bool = False


class ArrayBatch(msgspec.Struct, frozen=True, array_like=True):
    """One step of a model that answers with arrays.

    Attributes:
        num_requests: answered by it.
        num_tokens, num_computed: of encoders, tokens that were asked for and positions that were computed; else 0.
        seconds: that it took.
    """

    model: str
    num_requests: int
    num_tokens: int
    num_computed: int
    seconds: float


class TensorSpec(msgspec.Struct, frozen=True):
    """One input or output of a network: numpy's name of its type (or "bytes"), and its shape, -1 for any size."""

    dtype: str
    shape: list[int]


class ModelSpec(msgspec.Struct, frozen=True):
    """A model that does not generate, to be loaded into an engine process.

    Attributes:
        name: what clients call it.
        options: fields of EngineConfig; `model` is the folder, file or module:object.
        weight: its share of step time when others are busy, relative to theirs.
    """

    name: str
    options: dict[str, Any]
    weight: float = 1.0


class ModelInfo(msgspec.Struct, frozen=True):
    """What the engine says of a model that it has loaded.

    Attributes:
        kind: "encoder", "tensors", or "text" for an encoder-decoder.
        max_len: longest sequence in tokens, of an encoder-decoder longest source; 0 where there are none.
        report: how it runs, for people.
        max_answer, vocab_size: of an encoder-decoder, tokens of the longest answer and of the vocabulary.
        inputs, outputs: of a user's own network.
    """

    name: str
    kind: str
    max_len: int = 0
    report: str = ""
    max_answer: int = 0
    vocab_size: int = 0
    inputs: dict[str, TensorSpec] = {}
    outputs: dict[str, TensorSpec] = {}


def signature(specs: Mapping[str, TensorSpec]) -> str:
    """Inputs or outputs for people, such as `age: float32[-1, 1], name: bytes[-1, 1]`."""
    return ", ".join(f"{name}: {spec.dtype}{spec.shape}" for name, spec in specs.items())


def check_inputs(info: ModelInfo, inputs: Mapping[str, Array]) -> None:
    """Compare what a client sends with what the network takes.

    Raises:
        RequestError: wrong names, types or shapes; the message has the expected signature.
    """
    expected = f"{info.name} takes {signature(info.inputs)}"
    for title, names in (("lacks", info.inputs.keys() - inputs), ("has unknown", inputs.keys() - info.inputs)):
        if names:
            raise RequestError(f"the request {title} {', '.join(sorted(names))}; {expected}", "inputs")
    for name, spec in info.inputs.items():
        given = inputs[name]
        fits = len(given.shape) == len(spec.shape) and all(
            wanted in (-1, size) for size, wanted in zip(given.shape, spec.shape, strict=False)
        )
        if given.dtype != spec.dtype or not fits:
            raise RequestError(f"{name} is {given.dtype}{given.shape}; {expected}", name)
