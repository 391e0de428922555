"""The engine: plan, run, update; one model, many requests. Knows token ids only.

In-process users (`fastserve.LLM`) drive it directly; the server drives it in a process of its own
(`engine/process.py`). Not thread-safe: one thread calls everything.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import torch

from fastserve.checkpoint.folder import TEXT_GENERATION, TEXT_TO_TEXT, ModelFolder
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.core.config import EngineConfig, format_bytes
from fastserve.core.errors import CheckpointError, ConfigError, FastServeError, RequestError
from fastserve.core.request import FINISH_ERROR, Request, TokenOutput
from fastserve.engine.adapters import Adapters
from fastserve.engine.draft_model import MAX_GUESSES, DraftModel, check_draft
from fastserve.engine.executor import Executor
from fastserve.engine.grammar import GrammarCompiler
from fastserve.engine.kv_cache import KVCache
from fastserve.engine.kv_tiers import BlockStore, FileStore, HostStore, KVTiers
from fastserve.engine.memory import ElasticSize, MemoryPlan, free_memory, plan_memory
from fastserve.engine.messages import EngineStats
from fastserve.engine.model_runner import ModelRunner
from fastserve.engine.sources import SourceLimits
from fastserve.engine.warm_up import measure_steps
from fastserve.models.encoder_decoder import EncoderDecoder
from fastserve.models.loader import LoadedModel, load_model
from fastserve.scheduler.block_pool import BlockPool
from fastserve.scheduler.cost import CostModel
from fastserve.scheduler.drafts import Drafter, NgramDrafter
from fastserve.scheduler.policy import PolicyContext, make_policy
from fastserve.scheduler.scheduler import Scheduler
from fastserve.scheduler.tier_pool import Tier, TierPool

_MEMORY_MARGIN = 512 << 20  # of an elastic KV cache, besides what a step takes
_COMPILE_WAIT_SECONDS = 0.05


class Engine:
    """Load a model and serve requests step by step.

    Args:
        config: options; checked already.
        clock: seconds; a benchmark that runs several engines in turn gives each its own.
        cost: what learns how long steps take; a benchmark passes one that keeps what it sees.

    Attributes:
        max_model_len: longest prompt + output, tokens.
        vocab_size: ids are below this.
        memory: the memory plan.
        report: lines for people: model, kernels, memory.
        source_limits: of an encoder-decoder.

    Raises:
        CheckpointError, ConfigError, MemoryPlanError: the model cannot be loaded or does not fit.
    """

    def __init__(
        self, config: EngineConfig, clock: Callable[[], float] = time.monotonic, cost: CostModel | None = None
    ) -> None:
        cost = cost or CostModel()
        self._clock = clock
        policy = make_policy(config.scheduler, PolicyContext(cost, config.max_batch_sequences))
        torch.set_num_threads(config.num_threads or len(os.sched_getaffinity(0)))
        folder, loaded, self.memory = open_model(config)
        shape, end_ids = loaded.model.shape, folder.eos_token_ids
        self.max_model_len = self.memory.max_model_len
        self.vocab_size = shape.vocab_size
        self._grammars = GrammarCompiler(lambda: Tokenizer.load(folder), self.vocab_size, end_ids)
        self._compiling: dict[str, tuple[Request, Future[Any]]] = {}
        self._adapters = Adapters(loaded.linears, loaded.kernels, shape.dtype, config.max_loras, config.max_lora_rank)
        for name, path in config.adapters.items():
            self._adapters.load(name, path)
        max_blocks = max(self.memory.num_blocks, config.kv_cache_max_memory // self.memory.block_bytes)
        kv_cache = _make_kv_cache(loaded, self.memory, max_blocks)
        stores = _make_stores(config, loaded, sum(part[0].nbytes for part in kv_cache.parts))
        self._tiers = KVTiers(kv_cache, stores) if stores else None
        tier_pool = None
        if self._tiers is not None:
            measured = zip(stores, self._tiers.measure(), strict=True)
            tiers = [Tier(store.num_slots, seconds) for store, seconds in measured]
            tier_pool = TierPool(tiers, config.kv_replacement)
        self._drafts = _make_drafter(config, cost, loaded, self.memory, self._grammars)
        shares_prefixes = config.prefix_caching and not loaded.model.has_own_cache
        self._scheduler = Scheduler(
            BlockPool(self.memory.num_blocks, config.block_size, shares_prefixes, tier_pool),
            policy,
            max_batch_sequences=config.max_batch_sequences,
            max_batch_tokens=config.max_batch_tokens,
            max_model_len=self.max_model_len,
            eos_token_ids=end_ids,
            cost=cost,
            target_tpot=config.target_tpot_ms / 1e3,
            drafter=self._drafts,
            burst_seconds=0.0 if loaded.model.has_own_cache or loaded.draft else config.burst_ms / 1e3,
        )
        runner = ModelRunner(
            loaded.model, loaded.kernels, kv_cache, end_ids, self.max_model_len, self._grammars, self._adapters
        )
        self.report = "\n".join([*loaded.report, runner.report, self.memory.table()])
        self._executor = Executor(runner, kv_cache, self._tiers)
        self._device = loaded.model.device
        # One place in the batch each; a model that keeps its own cache cannot share it.
        self._max_beams = 1 if loaded.model.has_own_cache else min(config.max_batch_sequences, self.vocab_size // 4)
        self._elastic = ElasticSize(
            self.memory.block_bytes,
            self._scheduler.min_blocks,
            kv_cache.max_blocks,
            self.memory.activation_bytes + _MEMORY_MARGIN,
            interval=1.0 if config.kv_cache_max_memory else math.inf,
        )
        self.source_limits: SourceLimits | None = None
        if isinstance(loaded.model, EncoderDecoder):
            self.source_limits = SourceLimits(loaded.model, self.max_model_len, config.block_size)
        decides_by_cost = policy.uses_cost or tier_pool is not None or config.target_tpot_ms > 0
        decides_by_cost |= loaded.draft is not None and config.speculation == "auto"
        if decides_by_cost and not loaded.model.has_own_cache and self.source_limits is None:
            measure_steps(self._executor, cost, self.memory, config)
        self._stats = EngineStats(kv_blocks_total=self.memory.num_blocks)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: the prompt is empty, too long, or has ids outside the vocabulary; there is no such adapter.
        """
        if self.source_limits is not None:
            request = self.source_limits.place(request)
        elif request.num_source:
            raise RequestError("this model has no encoder; give a prompt alone", "prompt")
        if request.adapter:
            request = msgspec.structs.replace(request, adapter=self._adapters.key(request.adapter))
        prompt = request.prompt_ids
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token", "prompt")
        if len(prompt) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, but this model takes at most {self.max_model_len - 1} "
                "and one to answer; shorten it or raise max_model_len",
                "prompt",
            )
        sampling = request.sampling
        ids = (*prompt, *sampling.stop_token_ids, *(sampling.logit_bias or ()))
        if max(ids) >= self.vocab_size or min(ids) < 0:
            raise RequestError(f"token ids must be between 0 and {self.vocab_size - 1}", "prompt")
        if sampling.num_beams > self._max_beams:
            raise RequestError(f"num_beams may be {self._max_beams} here, not {sampling.num_beams}", "num_beams")
        self._stats.prompt_tokens += len(prompt)
        if sampling.structured_outputs is not None:
            self._compiling[request.request_id] = (request, self._grammars.submit(sampling.structured_outputs))
        else:
            self._scheduler.add(request, self._clock())

    def abort(self, request_ids: Iterable[str]) -> None:
        """Stop requests; no output follows for them. Unknown ids are ignored."""
        request_ids = list(request_ids)
        for request_id in request_ids:
            self._compiling.pop(request_id, None)
        self._scheduler.abort(request_ids)

    def load_adapter(self, name: str, path: str) -> None:
        """Make a LoRA adapter known; requests may have it from now on. Raises RequestError, see `Adapters.load`."""
        self._adapters.load(name, path)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            RequestError: there is none of this name, or requests use it.
        """
        key = self._adapters.key(name)
        if self._scheduler.uses(key) or any(request.adapter == key for request, _ in self._compiling.values()):
            raise RequestError(f"adapter {name!r} is in use; try again when its requests are done", "lora_name")
        self._adapters.unload(name)

    def has_work(self) -> bool:
        return self._scheduler.has_work() or bool(self._compiling)

    def step(self) -> list[TokenOutput]:
        """Compute one step; returns the new tokens."""
        refused = self._take_compiled() if self._compiling else []
        return refused + self._compute() if self._scheduler.has_work() else refused

    def _compute(self) -> list[TokenOutput]:
        """Plan and run what the scheduler has, be it nothing."""
        began = self._clock()
        if isinstance(self._drafts, DraftModel):
            self._drafts.guess(self._scheduler.draftable(MAX_GUESSES), self._scheduler.block_pool.block_size)
        started = self._clock()
        plan = self._scheduler.plan(started)
        result = self._executor.run(plan)
        ended = self._clock()
        outputs = self._scheduler.update(plan, result, ended - started, ended)
        self._stats.num_steps += result.num_rounds
        self._stats.step_seconds += ended - began
        for output in outputs:
            self._stats.generation_tokens += sum(len(answer.token_ids) for answer in output.as_answers())
        return outputs

    def _take_compiled(self) -> list[TokenOutput]:
        """Queue the requests whose grammars are compiled by now. Waits a little when there is nothing else to do."""
        if not self._scheduler.has_work():
            wait([future for _, future in self._compiling.values()], _COMPILE_WAIT_SECONDS, "FIRST_COMPLETED")
        refused: list[TokenOutput] = []
        for request_id, (request, future) in list(self._compiling.items()):
            if not future.done():
                continue
            del self._compiling[request_id]
            error = future.exception()
            if error is None:
                self._scheduler.add(request, self._clock())
            elif isinstance(error, FastServeError):
                is_refused = isinstance(error, RequestError)
                refused.append(TokenOutput(request_id, [], FINISH_ERROR, error=str(error), is_refused=is_refused))
            else:
                raise error
        return refused

    def resize_kv_cache(self, num_bytes: int) -> None:
        """Grow or shrink the KV cache, within kv_cache_max_memory and not below what the longest sequence needs.

        Memory of running sequences is given back when they end.
        """
        num_blocks = min(num_bytes // self.memory.block_bytes, self._elastic.max_blocks)
        self._scheduler.resize(num_blocks)
        if not self._scheduler.has_work():
            self._compute()  # an empty plan, which carries the size to the executor

    def tend(self) -> None:
        """What is to be done from time to time, busy or idle: with kv_cache_max_memory, follow the free memory."""
        now, elastic, pool = self._clock(), self._elastic, self._scheduler.block_pool
        if now >= elastic.next_look and elastic.interval < math.inf:
            elastic.next_look = now + elastic.interval
            advised = elastic.advise(free_memory(self._device), pool.num_blocks, pool.num_used)
            if advised != pool.num_blocks:
                self.resize_kv_cache(advised * self.memory.block_bytes)

    def stats(self) -> EngineStats:
        """Counters so far and gauges now. The same object each time; copy it to keep it."""
        pool, stats = self._scheduler.block_pool, self._stats
        stats.num_running = self._scheduler.num_running
        stats.num_waiting = self._scheduler.num_waiting
        stats.kv_blocks_used = pool.num_used
        stats.kv_blocks_total = pool.num_blocks
        stats.prefix_cache_queries = pool.num_queries
        stats.prefix_cache_hits = pool.num_hits
        stats.num_preemptions = self._scheduler.num_preemptions
        stats.recomputed_tokens = self._scheduler.num_recomputed_tokens
        stats.draft_tokens = self._scheduler.num_drafts
        stats.draft_tokens_right = self._scheduler.num_drafts_right
        stats.request_seconds = self._scheduler.request_seconds
        if pool.tiers is not None and self._tiers is not None:
            stats.kv_blocks_kept, stats.kv_blocks_restored = pool.tiers.num_kept, pool.tiers.num_restored
            stats.kv_errors, stats.kv_move_seconds = self._tiers.num_errors, self._tiers.wait_seconds
        return stats

    def close(self) -> None:
        self._executor.close()


def open_model(config: EngineConfig) -> tuple[ModelFolder, LoadedModel, MemoryPlan]:
    """Load the weights and plan the rest of the memory; nothing else is allocated yet.

    Raises:
        CheckpointError, ConfigError, MemoryPlanError: see `Engine`.
    """
    folder = ModelFolder.open(config.model)
    if folder.task not in (TEXT_GENERATION, TEXT_TO_TEXT):
        raise CheckpointError(
            f"{folder.path} is for {folder.task}, not for generating text: use fastserve.pipeline, or fastserve serve"
        )
    load = partial(
        load_model,
        dtype=config.dtype,
        device=config.device,
        kernels=config.kernels,
        backend=config.backend,
        quantization=config.quantization,
        block_size=config.block_size,
        trust_remote_code=config.trust_remote_code,
    )
    loaded = load(folder)
    if config.draft_model:
        draft_folder = ModelFolder.open(config.draft_model)
        draft = load(draft_folder)
        check_draft(folder, loaded, draft_folder, draft)
        size = format_bytes(draft.model.shape.weight_bytes)
        loaded = replace(loaded, draft=draft, report=[*loaded.report, f"draft model: {draft_folder.name}, {size}"])
    if config.kv_cache_dtype == "int8" and loaded.model.has_own_cache:
        raise ConfigError("this model keeps its own cache, which has no int8 form; use kv_cache_dtype=auto")
    memory = plan_memory(
        loaded.model.shape,
        loaded.model.device,
        max(0, free_memory(loaded.model.device) - (config.kv_host_cache if loaded.model.device.type == "cpu" else 0)),
        config,
        None if loaded.draft is None else loaded.draft.model.shape,
    )
    return folder, loaded, memory


def _make_drafter(
    config: EngineConfig, cost: CostModel, loaded: LoadedModel, memory: MemoryPlan, grammars: GrammarCompiler
) -> Drafter | None:
    if config.speculation == "off" or loaded.model.has_own_cache:
        return None
    known_cost = cost if config.speculation == "auto" else None
    if loaded.draft is None:
        return NgramDrafter(known_cost)
    draft, vocab_size = loaded.draft, loaded.model.shape.vocab_size
    adapters = Adapters({}, draft.kernels, draft.model.shape.dtype, 0, 0)
    longest = min(memory.max_model_len, draft.model.shape.max_positions)
    kv_cache = _make_kv_cache(draft, memory, memory.num_blocks)
    runner = ModelRunner(draft.model, draft.kernels, kv_cache, (), longest, grammars, adapters)
    return DraftModel(draft, runner, vocab_size, config.max_batch_tokens, known_cost)


def _make_kv_cache(loaded: LoadedModel, memory: MemoryPlan, max_blocks: int) -> KVCache:
    model, is_int8 = loaded.model, memory.kv_dtype is torch.int8
    num_blocks, max_blocks = (1, 1) if model.has_own_cache else (memory.num_blocks, max_blocks)
    return KVCache(model.shape, memory.block_size, num_blocks, max_blocks, model.device, is_int8)


def _make_stores(config: EngineConfig, loaded: LoadedModel, block_bytes: int) -> list[BlockStore]:
    """The tiers below the device, the fastest first."""
    if loaded.model.has_own_cache and (config.kv_host_cache or config.kv_disk_cache or config.kv_cache_max_memory):
        raise ConfigError(
            "kv_host_cache, kv_disk_cache and kv_cache_max_memory need a model that FastServe computes itself; leave "
            "them out, or choose --backend native"
        )
    for name, size in (("kv_host_cache", config.kv_host_cache), ("kv_disk_cache", config.kv_disk_cache)):
        if 0 < size < block_bytes:
            raise ConfigError(f"{name} is {size} bytes, but one KV block takes {block_bytes}; raise it or set it to 0")
    host, disk = config.kv_host_cache // block_bytes, config.kv_disk_cache // block_bytes
    stores: list[BlockStore] = [HostStore(host, block_bytes)] if host else []
    if disk:
        stores.append(FileStore(disk, block_bytes, config.kv_disk_folder))
    return stores
