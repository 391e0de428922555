"""The engine: plan, run, update; one model, many requests. Knows token ids only.

In-process users (`fastserve.LLM`) drive it directly; the server drives it in a process of its own
(`engine/process.py`). Not thread-safe: one thread calls everything.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import Future, wait
from typing import Any

import torch

from fastserve.checkpoint.folder import ModelFolder
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.core.config import EngineConfig
from fastserve.core.errors import ConfigError, FastServeError, RequestError
from fastserve.core.request import FINISH_ERROR, Request, TokenOutput
from fastserve.engine.executor import Executor, LocalExecutor
from fastserve.engine.grammar import GrammarCompiler
from fastserve.engine.kv_cache import KVCache
from fastserve.engine.memory import MemoryPlan, free_memory, plan_memory
from fastserve.engine.messages import EngineStats
from fastserve.engine.model_runner import ModelRunner
from fastserve.engine.warm_up import measure_steps
from fastserve.models.loader import LoadedModel, load_model
from fastserve.scheduler.block_pool import BlockPool
from fastserve.scheduler.cost import CostModel
from fastserve.scheduler.drafts import Drafter, NgramDrafter
from fastserve.scheduler.policy import PolicyContext, make_policy
from fastserve.scheduler.scheduler import Scheduler

_COMPILE_WAIT_SECONDS = 0.05


class Engine:
    """Load a model and serve requests step by step.

    Args:
        config: options; checked already.

    Attributes:
        max_model_len: longest prompt + output, tokens.
        vocab_size: ids are below this.
        memory: the memory plan.
        report: lines for people: model, kernels, memory.

    Raises:
        CheckpointError, ConfigError, MemoryPlanError: the model cannot be loaded or does not fit.
    """

    def __init__(self, config: EngineConfig) -> None:
        cost = CostModel()
        policy = make_policy(config.scheduler, PolicyContext(cost, config.max_batch_sequences))
        torch.set_num_threads(config.num_threads or len(os.sched_getaffinity(0)))
        folder, loaded, self.memory = open_model(config)
        shape = loaded.model.shape
        self.max_model_len = self.memory.max_model_len
        self.vocab_size = shape.vocab_size
        self._grammars = GrammarCompiler(lambda: Tokenizer.load(folder), self.vocab_size, folder.eos_token_ids)
        self._compiling: dict[str, tuple[Request, Future[Any]]] = {}
        self._scheduler = Scheduler(
            BlockPool(
                self.memory.num_blocks,
                config.block_size,
                prefix_caching=config.prefix_caching and not loaded.model.has_own_cache,
            ),
            policy,
            max_batch_sequences=config.max_batch_sequences,
            max_batch_tokens=config.max_batch_tokens,
            max_model_len=self.max_model_len,
            eos_token_ids=folder.eos_token_ids,
            cost=cost,
            drafter=None if loaded.model.has_own_cache else _make_drafter(config.speculation, cost),
        )
        runner = _make_runner(loaded, self.memory, folder.eos_token_ids, self._grammars)
        self.report = "\n".join([*loaded.report, runner.report, self.memory.table()])
        self._executor: Executor = LocalExecutor(runner)
        if policy.uses_cost and not loaded.model.has_own_cache:
            measure_steps(self._executor, cost, self.memory, config)
        self._stats = EngineStats(kv_blocks_total=self.memory.num_blocks)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: the prompt is empty, too long, or has ids outside the vocabulary.
        """
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
        self._stats.prompt_tokens += len(prompt)
        if sampling.structured_outputs is not None:
            self._compiling[request.request_id] = (request, self._grammars.submit(sampling.structured_outputs))
        else:
            self._scheduler.add(request, time.monotonic())

    def abort(self, request_ids: Iterable[str]) -> None:
        """Stop requests; no output follows for them. Unknown ids are ignored."""
        request_ids = list(request_ids)
        for request_id in request_ids:
            self._compiling.pop(request_id, None)
        self._scheduler.abort(request_ids)

    def has_work(self) -> bool:
        return self._scheduler.has_work() or bool(self._compiling)

    def step(self) -> list[TokenOutput]:
        """Compute one step; returns the new tokens."""
        refused = self._take_compiled() if self._compiling else []
        if not self._scheduler.has_work():
            return refused
        started = time.monotonic()
        plan = self._scheduler.plan(started)
        result = self._executor.run(plan)
        ended = time.monotonic()
        outputs = self._scheduler.update(plan, result, ended - started, ended)
        self._stats.num_steps += 1
        self._stats.step_seconds += ended - started
        self._stats.generation_tokens += sum(len(output.token_ids) for output in outputs)
        return refused + outputs

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
                self._scheduler.add(request, time.monotonic())
            elif isinstance(error, FastServeError):
                refused.append(TokenOutput(request_id, [], FINISH_ERROR, error=str(error)))
            else:
                raise error
        return refused

    def stats(self) -> EngineStats:
        """Counters so far and gauges now. The same object each time; copy it to keep it."""
        pool, stats = self._scheduler.block_pool, self._stats
        stats.num_running = self._scheduler.num_running
        stats.num_waiting = self._scheduler.num_waiting
        stats.kv_blocks_used = pool.num_used
        stats.prefix_cache_queries = pool.num_queries
        stats.prefix_cache_hits = pool.num_hits
        stats.num_preemptions = self._scheduler.num_preemptions
        return stats

    def close(self) -> None:
        self._executor.close()


def open_model(config: EngineConfig) -> tuple[ModelFolder, LoadedModel, MemoryPlan]:
    """Load the weights and plan the rest of the memory; nothing else is allocated yet.

    Raises:
        CheckpointError, ConfigError, MemoryPlanError: see `Engine`.
    """
    folder = ModelFolder.open(config.model)
    loaded = load_model(
        folder,
        dtype=config.dtype,
        device=config.device,
        kernels=config.kernels,
        backend=config.backend,
        block_size=config.block_size,
        trust_remote_code=config.trust_remote_code,
    )
    if config.kv_cache_dtype == "int8" and loaded.model.has_own_cache:
        raise ConfigError("this model keeps its own cache, which has no int8 form; use kv_cache_dtype=auto")
    memory = plan_memory(
        loaded.model.shape,
        loaded.model.device,
        free_memory(loaded.model.device),
        block_size=config.block_size,
        kv_cache_memory=config.kv_cache_memory,
        max_model_len=config.max_model_len,
        max_batch_sequences=config.max_batch_sequences,
        max_batch_tokens=config.max_batch_tokens,
        kv_cache_dtype=config.kv_cache_dtype,
    )
    return folder, loaded, memory


def _make_drafter(speculation: str, cost: CostModel) -> Drafter | None:
    if speculation == "off":
        return None
    return NgramDrafter(cost if speculation == "auto" else None)


def _make_runner(
    loaded: LoadedModel, memory: MemoryPlan, eos_token_ids: tuple[int, ...], grammars: GrammarCompiler
) -> ModelRunner:
    shape = loaded.model.shape
    kv_cache = KVCache(
        shape.num_layers,
        1 if loaded.model.has_own_cache else memory.num_blocks,
        memory.block_size,
        shape.num_kv_heads,
        shape.head_size,
        memory.kv_dtype,
        loaded.model.device,
    )
    device, max_len = loaded.model.device, memory.max_model_len
    return ModelRunner(loaded.model, loaded.kernels, kv_cache, eos_token_ids, device, max_len, grammars)
