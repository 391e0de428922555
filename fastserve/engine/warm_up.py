"""Time a few steps before the first request, so that the cost model starts from this machine and this model.

Also touches every layer once, so that the first request does not pay for it. What the steps write lands in free KV
blocks, which nobody reads before writing them again.
"""

from __future__ import annotations

import time

from fastserve.core.request import Request
from fastserve.core.sampling_params import SamplingParams
from fastserve.engine.executor import Executor
from fastserve.scheduler.cost import CostModel, StepWork
from fastserve.scheduler.plan import PlanEntry, StepPlan


def measure_steps(
    executor: Executor,
    cost: CostModel,
    *,
    num_blocks: int,
    block_size: int,
    max_batch_sequences: int,
    max_batch_tokens: int,
    max_seconds: float = 2.0,
) -> None:
    """Fit `cost` to prefills and decodes of several sizes, the small ones first, until the time is up.

    Every shape runs twice; the second time counts.
    """
    room = num_blocks * block_size
    measured: list[tuple[StepWork, float]] = []
    started = time.monotonic()
    for num_sequences, num_tokens, start in _shapes(max_batch_sequences, max_batch_tokens):
        blocks = -(-(start + num_tokens) // block_size)
        if num_sequences * blocks * block_size > room or time.monotonic() - started > max_seconds:
            continue
        for is_counted in (False, True):
            plan = _plan(num_sequences, num_tokens, start, blocks)
            began = time.perf_counter()
            executor.run(plan)
            seconds = time.perf_counter() - began
            if is_counted:
                measured.append((StepWork.of(plan), seconds))
            executor.run(StepPlan([], freed=[entry.request_id for entry in plan.entries]))
    if measured:
        cost.warm_up(measured)


def _shapes(max_sequences: int, max_tokens: int) -> list[tuple[int, int, int]]:
    """(sequences, tokens of each, start): decodes at two contexts, prefills of three sizes."""
    widths = sorted({1, max(1, max_sequences // 4), max_sequences})
    lengths = sorted({min(16, max_tokens), min(64, max_tokens), min(256, max_tokens)})
    short = [(width, 1, 15) for width in widths] + [(1, length, 0) for length in lengths]
    return short + [(width, 1, 255) for width in widths] + [(1, lengths[-1], 256)]


def _plan(num_sequences: int, num_tokens: int, start: int, blocks: int) -> StepPlan:
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, seed=0)
    return StepPlan(
        [
            PlanEntry(
                f"warm-up-{index}",
                [0] * num_tokens,
                start,
                list(range(index * blocks, (index + 1) * blocks)),
                True,
                Request(f"warm-up-{index}", [0] * (start + num_tokens), sampling, 0.0),
            )
            for index in range(num_sequences)
        ]
    )
