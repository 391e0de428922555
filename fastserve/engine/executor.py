"""Carry out plans: the runner in this process, with the memory that its plans speak of."""

from __future__ import annotations

from fastserve.engine.kv_cache import KVCache
from fastserve.engine.kv_tiers import KVTiers
from fastserve.engine.model_runner import ModelRunner
from fastserve.scheduler.plan import StepPlan, StepResult


class Executor:
    """Runs every plan it is given, in order."""

    def __init__(self, runner: ModelRunner, kv_cache: KVCache, tiers: KVTiers | None = None) -> None:
        self._runner = runner
        self._kv_cache = kv_cache
        self._tiers = tiers

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step. With nothing to compute, wait for blocks on their way to the device, if any."""
        if self._tiers is not None:
            self._tiers.start(plan.moves)
        if plan.num_blocks:
            self._kv_cache.resize(plan.num_blocks)
        result = self._runner.run(plan)
        if self._tiers is not None:
            result.loaded = self._tiers.collect(wait=not plan.entries)
        return result

    def close(self) -> None:
        """Free what is held. Safe to call twice."""
        if self._tiers is not None:
            self._tiers.close()
