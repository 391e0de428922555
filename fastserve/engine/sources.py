"""What an encoder-decoder has besides its decoder: sources, encoded once per request into blocks of the same KV cache.

To the scheduler, a sequence is its source (filled up to whole blocks), then the decoder's tokens. Here the first part
of a plan becomes keys and values of the source in its blocks, and what is left is the plan of a decoder whose positions
and blocks begin behind them. A sequence that lost its memory comes with its source again.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec
import torch

from fastserve.core.errors import RequestError
from fastserve.core.request import Request
from fastserve.engine.kv_cache import KVCache
from fastserve.kernels.interface import Batch
from fastserve.kernels.reference import Kernels
from fastserve.models.encoder import RaggedBatch
from fastserve.models.encoder_decoder import EncoderDecoder
from fastserve.scheduler.plan import PlanEntry, StepPlan

_FILLER = 0  # token that fills a source's last block; nobody reads it


class Sources:
    """The sources of live sequences, on the model's side.

    Args:
        model, kernels, kv_cache: those of the decoder.
    """

    def __init__(self, model: EncoderDecoder, kernels: Kernels, kv_cache: KVCache) -> None:
        self._model = model
        self._kernels = kernels
        self._kv_cache = kv_cache
        self._sources: dict[str, list[int]] = {}
        self._tables: dict[str, list[int]] = {}

    def admit(self, request: Request) -> None:
        """A sequence comes, or comes again."""
        self._sources[request.request_id] = request.prompt_ids[: request.num_source]

    def drop(self, request_id: str) -> None:
        """A sequence is over."""
        self._sources.pop(request_id, None)
        self._tables.pop(request_id, None)

    def compute(self, plan: StepPlan) -> StepPlan:
        """Encode the sources that this step brings; returns what it has for the decoder."""
        size = self._kv_cache.block_size
        entries: list[PlanEntry] = []
        fresh: list[PlanEntry] = []
        for entry in plan.entries:
            num_blocks = -(-len(self._sources[entry.request_id]) // size)
            num_taken = max(0, num_blocks * size - entry.start)
            self._tables[entry.request_id] = entry.block_ids[:num_blocks]
            if num_taken:
                fresh.append(entry)
            if num_taken < len(entry.token_ids):
                entries.append(
                    msgspec.structs.replace(
                        entry,
                        token_ids=entry.token_ids[num_taken:],
                        start=entry.start + num_taken - num_blocks * size,
                        block_ids=entry.block_ids[num_blocks:],
                    )
                )
        if fresh:
            self._encode(fresh)
        return msgspec.structs.replace(plan, entries=entries)

    def describe(self, batch: Batch) -> None:
        """Say in a batch of the decoder where the sources of its sequences are."""
        batch.source_lens = [len(self._sources[request_id]) for request_id in batch.request_ids]
        batch.source_tables = [self._tables[request_id] for request_id in batch.request_ids]

    def _encode(self, entries: list[PlanEntry]) -> None:
        """Keys and values of whole sources, stored from each entry's start on; what is before was cached."""
        size, device = self._kv_cache.block_size, self._model.device
        sources = [self._sources[entry.request_id] for entry in entries]
        batch = RaggedBatch.of(sources, [[] for _ in sources], device)
        rows: list[int] = []
        slots: list[int] = []
        for entry, source, first in zip(entries, sources, batch.starts, strict=False):
            places = range(entry.start, len(source))
            rows += [first + place for place in places]
            slots += [entry.block_ids[place // size] * size + place % size for place in places]
        slot_mapping = torch.tensor(slots, dtype=torch.int64, device=device)
        is_partial = len(rows) < batch.starts[-1]
        taken = torch.tensor(rows, dtype=torch.int64, device=device)
        pairs = zip(self._kv_cache.keys, self._kv_cache.values, strict=True)
        for (key, value), (keys, values) in zip(self._model.source_keys_values(batch), pairs, strict=True):
            if is_partial:
                key, value = key[taken], value[taken]
            self._kernels.store_kv(key, value, keys, values, slot_mapping)


class SourceLimits:
    """Checks requests of an encoder-decoder, and lays them out as its scheduler has them.

    Attributes:
        max_source: tokens of the longest source.
        max_target: tokens of the longest sequence of the decoder, those that it begins with included.
    """

    def __init__(self, model: EncoderDecoder, max_model_len: int, block_size: int) -> None:
        self._block_size = block_size
        self._max_model_len = max_model_len
        self.max_source = min(model.max_source, (max_model_len - 2) // block_size * block_size)
        self.max_target = model.max_target

    def place(self, request: Request) -> Request:
        """The request with its source filled up to whole blocks, and max_tokens within the decoder's limits.

        Raises:
            RequestError: no source, or one that is too long; an option that has no meaning here.
        """
        num_source, sampling = request.num_source, request.sampling
        source, start = request.prompt_ids[:num_source], request.prompt_ids[num_source:]
        if not source or not start:
            raise RequestError("an encoder-decoder needs a source, and tokens that its decoder begins with", "prompt")
        if num_source > self.max_source:
            raise RequestError(
                f"the text has {num_source} tokens, but this model takes at most {self.max_source}; split it, or raise "
                "max_model_len (a text and its answer together)",
                "prompt",
            )
        if sampling.prompt_logprobs is not None:
            raise RequestError(
                "an encoder gives its text no log probabilities; leave out prompt_logprobs", "prompt_logprobs"
            )
        filled = source + [_FILLER] * (-num_source % self._block_size)
        room = min(self.max_target, self._max_model_len - len(filled)) - len(start)
        if room < 1:
            raise RequestError(f"no room is left for an answer to {num_source} tokens; shorten the text", "prompt")
        if sampling.max_tokens is None or sampling.max_tokens > room:
            sampling = replace(sampling, max_tokens=room, min_tokens=min(sampling.min_tokens, room))
        return msgspec.structs.replace(request, prompt_ids=filled + start, sampling=sampling)
