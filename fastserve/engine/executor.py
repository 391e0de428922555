"""Carry out plans. One process here; a tensor-parallel executor broadcasts the same plan to its ranks."""

from __future__ import annotations

from typing import Protocol

from fastserve.engine.model_runner import ModelRunner
from fastserve.scheduler.plan import StepPlan
from fastserve.scheduler.scheduler import StepResult


class Executor(Protocol):
    """Runs every plan it is given, in order."""

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step."""

    def close(self) -> None:
        """Free what is held. Safe to call twice."""


class LocalExecutor:
    """The runner in this process."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def run(self, plan: StepPlan) -> StepResult:
        return self._runner.run(plan)

    def close(self) -> None:
        pass
