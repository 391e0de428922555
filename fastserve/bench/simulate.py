"""Run the engine's own Scheduler and policies with a cost model in place of the network, on a virtual clock.

What is simulated is only how long a step takes; every decision is made by the code that serves. Tokens are numbers
that nobody reads: lengths come from the trace, with `ignore_eos`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from fastserve.bench.coast import CoastingScheduler
from fastserve.bench.latencies import RequestTimes, saturated_rate
from fastserve.bench.traces import Trace, prompt_ids
from fastserve.core.errors import ConfigError
from fastserve.core.request import Request
from fastserve.core.sampling_params import SamplingParams
from fastserve.scheduler.block_pool import BlockPool
from fastserve.scheduler.cost import Coefficients, CostModel, StepWork, warm_up_shapes
from fastserve.scheduler.plan import StepPlan, StepResult
from fastserve.scheduler.policy import PolicyContext, make_policy

# llama-0.1b in float32 on two cores, measured roughly; pass your own for another model or machine.
LLAMA_01B_CPU = Coefficients(6e-3, 0.25e-3, 0.9e-3, 0.0, 0.5e-6)
_VOCAB_SIZE = 32_000


@dataclass(frozen=True, slots=True)
class Machine:
    """What is simulated.

    Attributes:
        coefficients: how long steps take.
        max_batch_sequences, max_batch_tokens: limits of one step.
        context: longest prompt + output in tokens.
        num_blocks, block_size: KV memory; 0 blocks means room for every request at once.
        prefix_caching: as in the engine.
        target_tpot: as the scheduler's, seconds; 0 for none.
        is_known: the scheduler's cost model is given the coefficients and stays; else it learns them from steps.

    Raises:
        ConfigError: a number with which nothing could run.
    """

    coefficients: Coefficients = LLAMA_01B_CPU
    max_batch_sequences: int = 16
    max_batch_tokens: int = 512
    context: int = 4096
    num_blocks: int = 0
    block_size: int = 16
    prefix_caching: bool = True
    target_tpot: float = 0.0
    is_known: bool = False

    def __post_init__(self) -> None:
        if self.max_batch_sequences < 1 or self.max_batch_tokens < self.max_batch_sequences:
            raise ConfigError("max_batch_sequences must be at least 1, and max_batch_tokens at least as many")
        if not 0 <= self.target_tpot < math.inf:
            raise ConfigError(f"the target time per token must be a time, or 0 for none, not {self.target_tpot:g} s")
        needed = -(-self.context // self.block_size)
        if self.num_blocks and self.num_blocks < needed:
            raise ConfigError(
                f"{self.num_blocks} blocks of {self.block_size} tokens cannot hold a context of {self.context} tokens; "
                f"give at least {needed}, a smaller context, or 0 blocks for enough"
            )


@dataclass(slots=True)
class Run:
    """One simulated run.

    Attributes:
        times: per request, in the trace's order.
        num_steps, num_recomputed_tokens, num_cached_tokens: counts over the run.
        num_preemptions, num_pauses: times that a started sequence lost its memory, and its place in the batch.
        busy_seconds: virtual time spent in steps.
        wall_seconds: real time the simulation took.
        queue_lengths: (time, running, waiting) after each step, where recorded.
        steps: (time at its end, prefill tokens, decoding sequences) of each step, where recorded.
    """

    times: list[RequestTimes]
    num_steps: int = 0
    num_preemptions: int = 0
    num_pauses: int = 0
    num_recomputed_tokens: int = 0
    num_cached_tokens: int = 0
    busy_seconds: float = 0.0
    wall_seconds: float = 0.0
    queue_lengths: list[tuple[float, int, int]] = field(default_factory=list)
    steps: list[tuple[float, int, int]] = field(default_factory=list)


def make_requests(trace: Trace, vocab_size: int = _VOCAB_SIZE) -> list[Request]:
    """The trace's requests with token ids; made once, used by every run."""
    return [
        Request(
            str(index),
            prompt_ids(item, index, vocab_size),
            SamplingParams(max_tokens=item.num_output, ignore_eos=True, seed=0),
            item.arrival,
            tenant=item.tenant,
        )
        for index, item in enumerate(trace.requests)
    ]


def warm_cost_model(machine: Machine) -> CostModel:
    """A cost model that has seen what an engine measures at warm-up, and nothing else."""
    measured: list[tuple[StepWork, float]] = []
    for num_sequences, num_tokens, start in warm_up_shapes(machine.max_batch_sequences, machine.max_batch_tokens):
        work = StepWork()
        for _ in range(num_sequences):
            work.add(start, num_tokens)
        measured.append((work, machine.coefficients.seconds(work)))
    model = CostModel()
    model.warm_up(measured)
    return model


class FixedCost(CostModel):
    """Knows the truth already; learns nothing. For long simulations, in which learning would take most of the time."""

    def observe(self, work: StepWork, seconds: float) -> None:
        """Nothing to learn."""


def make_scheduler(machine: Machine, policy: str, num_blocks: int) -> CoastingScheduler:
    """A Scheduler as the engine would make it."""
    cost = FixedCost(machine.coefficients) if machine.is_known else warm_cost_model(machine)
    return CoastingScheduler(
        BlockPool(num_blocks, machine.block_size, machine.prefix_caching),
        make_policy(policy, PolicyContext(cost, machine.max_batch_sequences)),
        max_batch_sequences=machine.max_batch_sequences,
        max_batch_tokens=machine.max_batch_tokens,
        max_model_len=machine.context,
        cost=cost,
        target_tpot=machine.target_tpot,
    )


class Replica:
    """One simulated engine with its own clock.

    Args:
        num_blocks: KV blocks.
        coasting: jump over steps that decide nothing (see `coast`); the result is the same.
        record: keep (time, running, waiting) and (time, prefill tokens, decodes) of every step; implies no coasting.
    """

    def __init__(
        self, machine: Machine, policy: str, num_blocks: int, coasting: bool = True, record: bool = False
    ) -> None:
        self.scheduler = make_scheduler(machine, policy, num_blocks)
        self.run = Run([])
        self.now = 0.0
        self._coefficients = machine.coefficients
        self._coasting = coasting and not record
        self._record = record
        self._live: dict[str, RequestTimes] = {}
        self._last: StepPlan | None = None  # the last plan, if the next ones may be like it

    @property
    def quiet_until(self) -> float:
        """Nobody finishes before this time, should nothing arrive: until then there is no need to `advance`."""
        return self.now + (self.scheduler.quiet_seconds(self._last, self._coefficients) if self._last else 0.0)

    @property
    def num_live(self) -> int:
        """Requests that came and have not finished."""
        return len(self._live)

    def add(self, request: Request) -> RequestTimes:
        """A request arrives; the clock must have been advanced to its arrival. Its times are filled in as it runs."""
        self.now = max(self.now, request.arrival_time)
        seen = RequestTimes(request.arrival_time, 0.0, 0.0, 0, len(request.prompt_ids), request.tenant)
        self._live[request.request_id] = seen
        self._last = None
        self.scheduler.add(request, self.now)
        return seen

    def advance(self, until: float = math.inf) -> None:
        """Run steps that start before `until`, while there is work."""
        scheduler, run = self.scheduler, self.run
        while self.now < until and scheduler.has_work():
            if self._last is not None:
                last, self._last = self._last, None
                if self._coast(last, until):
                    self._last = last if self.now >= until else None
                    continue
            plan = scheduler.plan(self.now)
            assert plan.entries, "the scheduler has work but plans none"
            work = StepWork.of(plan)
            seconds = self._coefficients.seconds(work)
            self.now += seconds
            self._take(plan, seconds)
            run.num_steps += 1
            run.busy_seconds += seconds
            if self._record:
                run.queue_lengths.append((self.now, scheduler.num_running, scheduler.num_waiting))
                run.steps.append((self.now, work.prefill_tokens, work.decodes))
            elif self._coasting and work.prefill_tokens == 0:
                self._last = plan

    def finish(self) -> Run:
        """Run to the end; returns the counts."""
        self.advance()
        self.run.num_preemptions = self.scheduler.num_preemptions
        self.run.num_pauses = self.scheduler.num_pauses
        self.run.num_recomputed_tokens = self.scheduler.num_recomputed_tokens
        return self.run

    def _take(self, plan: StepPlan, seconds: float) -> None:
        result = StepResult({entry.request_id: entry.start for entry in plan.entries if entry.samples})
        for output in self.scheduler.update(plan, result, seconds, self.now):
            seen = self._live[output.request_id]
            if seen.num_tokens == 0:
                seen.first_token = self.now
                self.run.num_cached_tokens += output.num_cached_tokens
            seen.num_tokens += 1
            seen.last_token = self.now
            if output.finish_reason is not None:
                del self._live[output.request_id]

    def _coast(self, plan: StepPlan, until: float) -> int:
        """Take steps like `plan` that start before `until`; how many there were."""
        started = self.now
        steps, self.now = self.scheduler.coast(plan, self._coefficients, self.now, until)
        if steps:
            self.run.num_steps += steps
            self.run.busy_seconds += self.now - started
            for entry in plan.entries:
                seen = self._live[entry.request_id]
                seen.num_tokens += steps
                seen.last_token = self.now
        return steps


def simulate(
    requests: list[Request], machine: Machine, policy: str, record: bool = False, coasting: bool = True
) -> Run:
    """Serve `requests` (in order of arrival) to the end; see `Replica`."""
    started = time.perf_counter()
    size = machine.block_size
    room = sum(-(-(len(item.prompt_ids) + (item.sampling.max_tokens or 1)) // size) + 1 for item in requests)
    num_blocks = machine.num_blocks or max(room, -(-machine.context // size))
    replica = Replica(machine, policy, num_blocks, coasting, record)
    for request in requests:
        replica.advance(request.arrival_time)
        replica.run.times.append(replica.add(request))
    run = replica.finish()
    run.wall_seconds = time.perf_counter() - started
    return run


def capacity(trace: Trace, machine: Machine) -> float:
    """Requests per second with FCFS while the queue is never empty (see `latencies.saturated_rate`)."""
    return saturated_rate(
        simulate(make_requests(trace.all_at_once()), machine, "fcfs").times, machine.max_batch_sequences
    )
