"""An encoder with its queue: requests are packed, padding-free, into ragged batches as they come.

Nothing waits while the model is idle: a step takes what is there, up to the token budget, and what arrives meanwhile
makes the next batch, so batches grow with the load by themselves. Knows token ids and arrays only.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

from fastserve.checkpoint.folder import ModelFolder
from fastserve.checkpoint.sentence import SentenceModules
from fastserve.core.arrays import HEADS, ArrayOutput, ArrayRequest, ModelInfo, ModelSpec, PoolingRequest
from fastserve.core.config import EngineConfig, format_bytes
from fastserve.core.errors import MemoryPlanError, RequestError
from fastserve.engine.array_codec import from_numpy
from fastserve.engine.memory import free_memory, keep_freed_memory
from fastserve.engine.messages import MAX_FRAME_BYTES
from fastserve.models.encoder import RaggedBatch
from fastserve.models.encoder_loader import load_encoder
from fastserve.models.loader import resolve_device
from fastserve.models.pooling import Embedder

_KEPT_MEMORY = 128 << 20


class PoolingRuntime:
    """Load an encoder and answer requests step by step.

    Attributes:
        info: what clients are told.
        weight: of its share of step time.
        num_tokens, num_computed: asked for and computed so far (see `ArrayBatch`).

    Raises:
        CheckpointError, ConfigError, MemoryPlanError: it cannot be loaded or does not fit.
    """

    def __init__(self, spec: ModelSpec) -> None:
        config = EngineConfig.from_options(spec.options)
        folder = ModelFolder.open(config.model)
        _check_memory(folder, config)
        loaded = load_encoder(
            folder,
            dtype=config.dtype,
            device=config.device,
            kernels=config.kernels,
            quantization=config.quantization,
        )
        keep_freed_memory(_KEPT_MEMORY)
        self._model = loaded.model
        modules = SentenceModules.read(folder) or SentenceModules()
        self._embedder = Embedder(modules, self._model.device)
        shape = self._model.shape
        max_len = min(filter(None, (shape.max_positions, config.max_model_len)))
        self._max_tokens = max(config.max_batch_tokens, max_len)
        self._vocab_size = shape.vocab_size
        self._waiting: dict[str, PoolingRequest] = {}
        self.weight = spec.weight
        self.num_tokens = self.num_computed = 0
        numbers = f"{shape.num_parameters / 1e6:.1f} M parameters, {format_bytes(shape.weight_bytes)}"
        report = f"{spec.name}: {folder.architecture}, {numbers}, {'; '.join(loaded.report)}"
        self.info = ModelInfo(spec.name, "encoder", max_len, report)

    def add(self, request: ArrayRequest) -> None:
        """Queue a request.

        Raises:
            RequestError: not for an encoder, empty, too long, with ids that do not exist, or with too large an answer.
        """
        if not isinstance(request, PoolingRequest) or request.head not in HEADS:
            raise RequestError(f"{self.info.name} is an encoder; it takes token ids, for one of {', '.join(HEADS)}")
        ids, types = request.input_ids, request.type_ids
        if not ids or len(ids) > self.info.max_len:
            raise RequestError(f"{self.info.name} takes 1 to {self.info.max_len} tokens, not {len(ids)}", "input")
        if max(ids) >= self._vocab_size or min(ids) < 0:
            raise RequestError(f"token ids must be between 0 and {self._vocab_size - 1}", "input")
        num_types = self._model.config.num_types  # a single one says nothing
        if types and num_types > 1 and (len(types) != len(ids) or min(types) < 0 or max(types) >= num_types):
            raise RequestError(f"token types must be as many as tokens, between 0 and {num_types - 1}", "input")
        head = self._model.head_config
        if request.head == "scores" and head is None:
            raise RequestError(f"{self.info.name} is an encoder without a head; ask for embeddings", "model")
        if request.rows and (head is None or head.pool or not 0 <= min(request.rows) <= max(request.rows) < len(ids)):
            raise RequestError("rows must be places of tokens, for a head that reads every token")
        width = self._model.config.hidden_size if request.head == "hidden" else 0
        if request.head == "scores" and head is not None and not head.pool:
            width = head.num_outputs
        num_bytes = 4 * width * len(request.rows or ids)
        if num_bytes > MAX_FRAME_BYTES:
            raise RequestError(
                f"the answer would take {format_bytes(num_bytes)}, and may take {format_bytes(MAX_FRAME_BYTES)}; give "
                "less text at a time",
                "input",
            )
        self._waiting[request.request_id] = request

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget requests that have not been computed; unknown ids are ignored."""
        for request_id in request_ids:
            self._waiting.pop(request_id, None)

    def has_work(self) -> bool:
        return bool(self._waiting)

    @property
    def num_waiting(self) -> int:
        """Requests that have not been computed."""
        return len(self._waiting)

    @torch.inference_mode()
    def step(self) -> list[ArrayOutput]:
        """Compute one ragged batch; returns the answers to its requests."""
        requests = self._take()
        batch = RaggedBatch.of(
            [request.input_ids for request in requests],
            [request.type_ids if self._model.config.num_types > 1 else [] for request in requests],
            self._model.device,
        )
        self.num_tokens += sum(len(request.input_ids) for request in requests)
        self.num_computed += batch.input_ids.shape[0]
        hidden = self._model.forward(batch)
        results = self._finish(requests[0].head, hidden, batch, requests)
        return [
            ArrayOutput(request.request_id, {"": from_numpy(result.float().cpu().numpy())})
            for request, result in zip(requests, results, strict=True)
        ]

    def _take(self) -> list[PoolingRequest]:
        """Requests of one kind that fit into the token budget together: the most urgent first, else as they came."""
        ordered = sorted(self._waiting.values(), key=lambda request: (request.priority, request.arrival_time))
        taken: list[PoolingRequest] = []
        num_tokens = 0
        for request in ordered:
            if request.head != ordered[0].head:
                continue
            num_tokens += len(request.input_ids)
            if taken and num_tokens > self._max_tokens:
                break
            taken.append(self._waiting.pop(request.request_id))
        return taken

    def _finish(self, head: str, hidden: Tensor, batch: RaggedBatch, requests: list[PoolingRequest]) -> list[Tensor]:
        """One result per request: [N], or [its rows, N]."""
        if head == "embed":
            return list(self._embedder(hidden, batch.starts))
        sizes = [end - start for start, end in pairwise(batch.starts)]
        if head == "hidden":
            return list(hidden.float().split(sizes))
        assert self._model.head_config is not None
        if self._model.head_config.pool:
            return list(self._model.scores(hidden, batch))
        if not any(request.rows for request in requests):
            return list(self._model.scores(hidden, batch).split(sizes))
        places = [
            [start + row for row in (request.rows or range(len(request.input_ids)))]
            for start, request in zip(batch.starts, requests, strict=False)
        ]
        rows = torch.tensor([place for item in places for place in item], device=hidden.device)
        return list(self._model.scores(hidden, batch, rows).split([len(item) for item in places]))


def _check_memory(folder: ModelFolder, config: EngineConfig) -> None:
    """Refuse what does not fit beside what is loaded already.

    Raises:
        MemoryPlanError: with what would help.
    """
    free, needed = free_memory(resolve_device(config.device)), folder.weight_bytes
    if needed > free:
        raise MemoryPlanError(
            f"{folder.path} needs {format_bytes(needed)} for its weights, but only {format_bytes(free)} are free; "
            "unload another model, lower kv_cache_memory, or choose a smaller dtype"
        )
