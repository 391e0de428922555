"""Skip what decides nothing: a Scheduler that repeats its last step while the next one could not differ.

While everyone in the batch decodes, nobody arrives, finishes, runs out of memory or changes rank, each step is the last
one again with one more token of context. `coast` carries out a run of them without planning: the same sums, the same
block moves and the same calls to policy and cost model as step by step (a property test holds the two together).
"""

from __future__ import annotations

import math

from fastserve.scheduler.cost import Coefficients, StepWork
from fastserve.scheduler.plan import StepPlan
from fastserve.scheduler.scheduler import Scheduler
from fastserve.scheduler.sequence import Sequence

_SHORTEST = 2  # fewer steps are not worth the look


class CoastingScheduler(Scheduler):
    """For simulated requests only: `ignore_eos`, no stop tokens, no log probabilities; made token i is i - 1."""

    def coast(self, plan: StepPlan, coefficients: Coefficients, now: float, until: float) -> tuple[int, float]:
        """Repeat `plan`, just updated at `now`, while a step starts before `until` and would be planned the same.

        Returns:
            How many steps were taken, and the time after them.
        """
        limit = self._steps_alike(plan)
        if limit < _SHORTEST:
            return 0, now
        until = min(until, self._fresh.next_review, self._paused.next_review)
        sequences = [item.sequence for item in self._running]
        work = StepWork(decodes=len(sequences), decode_context=sum(item.num_computed + 1 for item in sequences))
        steps = 0
        while steps < limit and now < until:
            self._grow_all(sequences)
            seconds = coefficients.seconds(work)
            now += seconds
            shares = self._shares(sequences, seconds) if self._charges else None
            self.cost.observe(work, seconds)
            self._compute_all(sequences, shares, now)
            work.decode_context += len(sequences)
            steps += 1
        return steps, now

    def quiet_seconds(self, plan: StepPlan, coefficients: Coefficients) -> float:
        """For so long at least, steps are like `plan`, the last one, should nothing arrive: they only get longer."""
        return self._steps_alike(plan) * coefficients.seconds(StepWork.of(plan))

    def _steps_alike(self, plan: StepPlan) -> int:
        """How many steps like the last one follow, arrivals aside: nobody ends in them, nobody's turn changes."""
        running = self._running
        if not running or len(running) != len(plan.entries) or self._freed:
            return 0
        if self.num_waiting and (len(running) < self._max_sequences or self._policy.preemptive):
            return 0  # somebody waits for memory or tokens, or may overtake: planned anew each time
        steps = math.inf
        for item in running:
            sequence = item.sequence
            if not sequence.is_decoding:
                return 0
            steps = min(steps, sequence.max_length - len(sequence.token_ids) - 1)
            if self._policy.preemptive:
                steps = min(steps, self._policy.stable_tokens(sequence))
        while steps >= _SHORTEST and self._blocks_for(int(steps)) > self.block_pool.num_free:
            steps //= 2
        return int(steps)

    def _blocks_for(self, steps: int) -> int:
        sequences = [item.sequence for item in self._running]
        return sum(self._num_blocks(item.num_computed + steps) - len(item.block_ids) for item in sequences)

    def _grow_all(self, sequences: list[Sequence]) -> None:
        size = self.block_pool.block_size
        for sequence in sequences:
            if sequence.num_computed == len(sequence.block_ids) * size:
                blocks = self.block_pool.allocate(1)
                assert blocks is not None, "counted before"
                sequence.block_ids += blocks

    def _shares(self, sequences: list[Sequence], seconds: float) -> list[float]:
        """As `CostModel.account` shares a step out."""
        each = self.cost.coefficients
        shares = [each.decode + each.decode_context * (item.num_computed + 1) for item in sequences]
        scale = seconds / max(sum(shares), 1e-12)
        return [share * scale for share in shares]

    def _compute_all(self, sequences: list[Sequence], shares: list[float] | None, now: float) -> None:
        size = self.block_pool.block_size
        for index, sequence in enumerate(sequences):
            sequence.num_computed += 1
            if sequence.num_computed // size > sequence.num_published:
                self.block_pool.publish_computed(sequence)
            if shares is not None:
                self._policy.on_service(sequence, 1, shares[index], now)
            sequence.token_ids.append(sequence.num_computed - 1)
