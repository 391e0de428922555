"""Frames between the API process and the engine process: msgspec structs, msgpack, length-prefixed.

A frame is four bytes of little-endian length and that many bytes of msgpack. Structs are tagged with their names, so
decoding is typed and nothing but these can arrive; there is no pickle and no TCP port.
"""

from __future__ import annotations

import struct

import msgspec

from fastserve.core.arrays import ArrayBatch, ArrayOutput, ArrayRequest, ModelInfo, ModelSpec
from fastserve.core.errors import RequestError
from fastserve.core.request import Request, TokenOutput

MAX_FRAME_BYTES = 64 * 1024 * 1024
HEADER = struct.Struct("<I")


class Configure(msgspec.Struct, tag=True):
    """API -> engine, first frame: EngineConfig as a mapping (of a model that `generates`, or not); the other models."""

    options: dict[str, object]
    models: list[ModelSpec] = []
    generates: bool = True


class Add(msgspec.Struct, tag=True):
    """API -> engine: start this request."""

    request: Request | ArrayRequest


class Load(msgspec.Struct, tag=True):
    """API -> engine: load a further model that does not generate. `Loaded` answers."""

    model: ModelSpec


class Unload(msgspec.Struct, tag=True):
    """API -> engine: forget a model; requests that wait for it are not answered."""

    name: str


class Abort(msgspec.Struct, tag=True):
    """API -> engine: stop these requests and free what they hold. No output follows."""

    request_ids: list[str]


class ChangeAdapter(msgspec.Struct, tag=True):
    """API -> engine: load the LoRA adapter in a folder, or without a path forget it. `Done` follows."""

    name: str
    path: str = ""


class Done(msgspec.Struct, tag=True):
    """Engine -> API: the oldest ChangeAdapter without an answer was carried out; or why not."""

    error: str = ""
    param: str | None = None


class Shutdown(msgspec.Struct, tag=True):
    """API -> engine: finish the current step and exit."""


class EngineStats(msgspec.Struct):
    """Counters and gauges of one engine; counters only grow.

    Attributes:
        num_running, num_waiting: sequences now.
        kv_blocks_used, kv_blocks_total: blocks held by live sequences, and all.
        prefix_cache_queries, prefix_cache_hits: prompt tokens looked up in the prefix cache, and found.
        num_preemptions, num_steps, prompt_tokens, generation_tokens: totals.
        step_seconds: total time spent in steps.
        recomputed_tokens: computed again after their memory was taken.
        kv_blocks_kept, kv_blocks_restored, kv_errors: copied to lower tiers, brought back, and failed reads and writes.
        draft_tokens, draft_tokens_right: guesses that were verified, and those that were right.
        kv_move_seconds: part of step_seconds in which a step waited for such copies.
        request_seconds: gauge: time of the engine that a request takes, as expected now.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    step_seconds: float = 0.0
    recomputed_tokens: int = 0
    kv_blocks_kept: int = 0
    kv_blocks_restored: int = 0
    kv_errors: int = 0
    kv_move_seconds: float = 0.0
    draft_tokens: int = 0
    draft_tokens_right: int = 0
    request_seconds: float = 0.0


class Ready(msgspec.Struct, tag=True):
    """Engine -> API: all is loaded. `report` is the memory plan for people; `models` are those that do not generate."""

    max_model_len: int
    vocab_size: int
    report: str
    models: list[ModelInfo] = []


class Loaded(msgspec.Struct, tag=True):
    """Engine -> API: a further model is loaded, or why not; `kind` is the error class's name."""

    name: str
    info: ModelInfo | None = None
    error: str = ""
    kind: str = ""


class Outputs(msgspec.Struct, tag=True):
    """Engine -> API: what one step made (a `batch` of those answered once), and the counters; empty as a heartbeat."""

    outputs: list[TokenOutput]
    stats: EngineStats
    answers: list[ArrayOutput] = []
    batch: ArrayBatch | None = None


class Failed(msgspec.Struct, tag=True):
    """Engine -> API: it cannot start or go on; `message` is for the user, `kind` the error class's name."""

    message: str
    kind: str


ToEngine = Configure | Add | Load | Unload | Abort | ChangeAdapter | Shutdown
FromEngine = Ready | Outputs | Loaded | Done | Failed

_encoder = msgspec.msgpack.Encoder()
to_engine_decoder = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder = msgspec.msgpack.Decoder(FromEngine)


def encode_frame(message: ToEngine | FromEngine) -> bytes:
    """One message as a length-prefixed frame. Raises RequestError for one too large, or with what no frame can hold."""
    try:
        payload = _encoder.encode(message)
    except (OverflowError, UnicodeEncodeError) as error:
        raise RequestError(f"the request cannot be sent to the engine: {error}") from error
    return HEADER.pack(checked_length(len(payload))) + payload


def checked_length(length: int) -> int:
    """The length of a frame's payload in bytes. Raises RequestError when it exceeds MAX_FRAME_BYTES."""
    if length > MAX_FRAME_BYTES:
        raise RequestError(f"{length} bytes are more than the {MAX_FRAME_BYTES} that the engine takes or gives at once")
    return length
