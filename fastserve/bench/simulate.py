"""Run the engine's own Scheduler and policies with a cost model in place of the network, on a virtual clock.

What is simulated is only how long a step takes; every decision is made by the code that serves. Tokens are numbers
that nobody reads: lengths come from the trace, with `ignore_eos`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fastserve.bench.latencies import RequestTimes
from fastserve.bench.traces import Trace, prompt_ids
from fastserve.core.request import Request
from fastserve.core.sampling_params import SamplingParams
from fastserve.scheduler.block_pool import BlockPool
from fastserve.scheduler.cost import Coefficients, CostModel, StepWork, warm_up_shapes
from fastserve.scheduler.policy import PolicyContext, make_policy
from fastserve.scheduler.scheduler import Scheduler, StepResult

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
    """

    coefficients: Coefficients = LLAMA_01B_CPU
    max_batch_sequences: int = 16
    max_batch_tokens: int = 512
    context: int = 4096
    num_blocks: int = 0
    block_size: int = 16
    prefix_caching: bool = True


@dataclass(slots=True)
class Run:
    """One simulated run.

    Attributes:
        times: per request, in the trace's order.
        num_steps, num_recomputed_tokens, num_cached_tokens: counts over the run.
        num_preemptions, num_pauses: times that a started sequence lost its memory, and its place in the batch.
        busy_seconds: virtual time spent in steps.
        wall_seconds: real time the simulation took.
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


def make_scheduler(machine: Machine, policy: str, requests: list[Request]) -> Scheduler:
    """A Scheduler as the engine would make it."""
    size = machine.block_size
    room = sum(-(-(len(item.prompt_ids) + (item.sampling.max_tokens or 1)) // size) + 1 for item in requests)
    cost = warm_cost_model(machine)
    return Scheduler(
        BlockPool(machine.num_blocks or max(room, -(-machine.context // size)), size, machine.prefix_caching),
        make_policy(policy, PolicyContext(cost, machine.max_batch_sequences)),
        max_batch_sequences=machine.max_batch_sequences,
        max_batch_tokens=machine.max_batch_tokens,
        max_model_len=machine.context,
        cost=cost,
    )


def simulate(requests: list[Request], machine: Machine, policy: str, sample_every: float = 0.0) -> Run:
    """Serve `requests` (in order of arrival) to the end.

    Args:
        policy: a scheduler's name.
        sample_every: virtual seconds between samples of (time, running, waiting); 0 takes none.
    """
    started = time.perf_counter()
    scheduler = make_scheduler(machine, policy, requests)
    times = {item.request_id: RequestTimes(item.arrival_time, 0.0, 0.0, 0, item.tenant) for item in requests}
    run = Run(list(times.values()))
    now, upcoming = 0.0, 0
    while upcoming < len(requests) or scheduler.has_work():
        if not scheduler.has_work():
            now = max(now, requests[upcoming].arrival_time)
        while upcoming < len(requests) and requests[upcoming].arrival_time <= now:
            scheduler.add(requests[upcoming], now)
            upcoming += 1
        plan = scheduler.plan(now)
        assert plan.entries, "the scheduler has work but plans none"
        seconds = machine.coefficients.seconds(StepWork.of(plan))
        now += seconds
        result = StepResult({entry.request_id: entry.start for entry in plan.entries if entry.samples})
        for output in scheduler.update(plan, result, seconds, now):
            seen = times[output.request_id]
            if seen.num_tokens == 0:
                seen.first_token = now
                run.num_cached_tokens += output.num_cached_tokens
            seen.num_tokens += 1
            seen.last_token = now
        run.num_steps += 1
        run.busy_seconds += seconds
        if sample_every and (not run.queue_lengths or now - run.queue_lengths[-1][0] >= sample_every):
            run.queue_lengths.append((now, scheduler.num_running, scheduler.num_waiting))
    run.num_preemptions = scheduler.num_preemptions
    run.num_pauses = scheduler.num_pauses
    run.num_recomputed_tokens = scheduler.num_recomputed_tokens
    run.wall_seconds = time.perf_counter() - started
    return run


def capacity(trace: Trace, machine: Machine) -> float:
    """Requests per second with FCFS while the queue is never empty: from a full batch to the last first token.

    The end, when the last long answers run in an ever smaller batch, says nothing about a server under load.
    """
    requests = make_requests(trace.all_at_once())
    first_tokens = sorted(item.first_token for item in simulate(requests, machine, "fcfs").times)
    filled = min(machine.max_batch_sequences, len(requests) // 2)
    return (len(requests) - filled) / (first_tokens[-1] - first_tokens[filled - 1])
