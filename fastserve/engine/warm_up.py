"""Time a few steps before the first request, so that the cost model starts from this machine and this model.

Done where something is decided by it from the start (`SchedulingPolicy.uses_cost`, KV tiers, a TPOT target, a draft
model); else it learns from real steps alone. What the steps write lands in free KV blocks, which nobody reads before
writing them again.
"""

from __future__ import annotations

import time

from fastserve.core.config import EngineConfig
from fastserve.core.request import Request
from fastserve.core.sampling_params import SamplingParams
from fastserve.engine.executor import Executor
from fastserve.engine.memory import MemoryPlan
from fastserve.scheduler.cost import CostModel, StepWork, warm_up_shapes
from fastserve.scheduler.plan import PlanEntry, StepPlan


def measure_steps(
    executor: Executor, cost: CostModel, memory: MemoryPlan, config: EngineConfig, max_seconds: float = 2.0
) -> None:
    """Fit `cost` to prefills and decodes of several sizes until the time is up. Each runs twice, the second counts."""
    measured: list[tuple[StepWork, float]] = []
    started = time.monotonic()
    for num_sequences, num_tokens, start in warm_up_shapes(config.max_batch_sequences, config.max_batch_tokens):
        blocks = -(-(start + num_tokens) // memory.block_size)
        fits = start + num_tokens <= memory.max_model_len and num_sequences * blocks <= memory.num_blocks
        if not fits or time.monotonic() - started > max_seconds:
            continue
        plan = _plan(num_sequences, num_tokens, start, blocks)
        for _ in range(2):
            began = time.perf_counter()
            executor.run(plan)
            seconds = time.perf_counter() - began
            executor.run(StepPlan([], freed=[entry.request_id for entry in plan.entries]))
        measured.append((StepWork.of(plan), seconds))
    if measured:
        cost.warm_up(measured)


def _plan(num_sequences: int, num_tokens: int, start: int, blocks: int) -> StepPlan:
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, seed=0)
    entries: list[PlanEntry] = []
    for index in range(num_sequences):
        request = Request(f"warm-up-{index}", [0] * (start + num_tokens), sampling, 0.0)
        block_ids = list(range(index * blocks, (index + 1) * blocks))
        entries.append(PlanEntry(request.request_id, [0] * num_tokens, start, block_ids, True, request))
    return StepPlan(entries)
