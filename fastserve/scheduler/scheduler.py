"""Decide what to compute next: one token budget per step, decodes first, prefills in chunks.

`plan` picks sequences in the policy's order and gives each its tokens and blocks; `update` takes in what the step
made. There is no prefill/decode split: a plan is {sequence: number of tokens}. When blocks run out, the worst-ranked
holder is dropped and recomputed later (its full blocks often survive in the prefix cache). Pure Python over integers;
the clock is an argument.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from fastserve.core.request import (
    FINISH_LENGTH,
    FINISH_STOP,
    Request,
    TokenLogprobs,
    TokenOutput,
)
from fastserve.scheduler.block_pool import BlockPool, hash_block
from fastserve.scheduler.plan import PlanEntry, StepPlan
from fastserve.scheduler.policy import Rank, SchedulingPolicy
from fastserve.scheduler.sequence import Residency, Sequence, Status


@dataclass(slots=True)
class StepResult:
    """What the executor made of a plan.

    Attributes:
        tokens: request id -> sampled token, for entries with `samples`.
        logprobs: request id -> its log probabilities, where asked for.
        prompt_logprobs: request id -> log probabilities of prompt tokens start + 1 .. computed in this step.
    """

    tokens: dict[str, int]
    logprobs: dict[str, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)


class _Queued(NamedTuple):
    rank: Rank
    arrival_order: int
    sequence: Sequence


def _order(item: _Queued) -> tuple[Rank, int]:
    return item[:2]


class Scheduler:
    """Owns the sequences and the blocks; writes status and residency.

    Args:
        block_pool: the KV blocks. They must hold at least one sequence of `max_model_len`.
        policy: order of service.
        max_batch_sequences, max_batch_tokens: limits of one step.
        max_model_len: longest sequence in tokens.
        eos_token_ids: the model's end tokens.
    """

    def __init__(
        self,
        block_pool: BlockPool,
        policy: SchedulingPolicy,
        *,
        max_batch_sequences: int,
        max_batch_tokens: int,
        max_model_len: int,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        assert block_pool.num_blocks * block_pool.block_size >= max_model_len
        self.block_pool = block_pool
        self.num_preemptions = 0
        self._policy = policy
        self._max_sequences = max_batch_sequences
        self._max_tokens = max_batch_tokens
        self._max_model_len = max_model_len
        self._eos_token_ids = frozenset(eos_token_ids)
        self._sequences: dict[str, Sequence] = {}
        self._running: list[_Queued] = []  # in rank order
        self._waiting: list[_Queued] = []  # a heap; entries of finished sequences are skipped when met
        self._num_waiting = 0
        self._paused: dict[str, Sequence] = {}  # waiting, but holding blocks
        self._num_arrived = 0
        self._freed: list[str] = []
        self._prompt_logprobs: dict[str, list[TokenLogprobs | None]] = {}

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    def has_work(self) -> bool:
        return bool(self._sequences)

    def add(self, request: Request, now: float) -> None:
        """Take in a request. Its prompt must be shorter than max_model_len, its id new."""
        assert request.request_id not in self._sequences, "request id in use"
        assert 0 < len(request.prompt_ids) < self._max_model_len
        self._num_arrived += 1
        sequence = Sequence.from_request(request, self._num_arrived)
        self._sequences[request.request_id] = sequence
        self._policy.on_arrival(sequence, now)
        self._enqueue(sequence, now)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop these requests and free what they hold; unknown ids are ignored (they may just have finished)."""
        for request_id in request_ids:
            sequence = self._sequences.get(request_id)
            if sequence is not None:
                self._finish(sequence)

    def plan(self, now: float) -> StepPlan:
        """Choose the next step's work. An empty plan means that there is nothing to do."""
        entries: list[PlanEntry] = []
        num_preempted = self.num_preemptions
        if self._policy.preemptive:
            self._pause_outranked(now)
        decodes = sum(item.sequence.num_remaining == 1 for item in self._running)
        prefill_budget = self._max_tokens - decodes
        for item in list(self._running):
            sequence = item.sequence
            if sequence.status is not Status.RUNNING:
                continue  # preempted for a better-ranked one a moment ago
            is_decode = sequence.num_remaining == 1
            take = 1 if is_decode else min(sequence.num_remaining, prefill_budget)
            if take == 0 or not self._grow(sequence, take, now):
                continue
            if not is_decode:
                prefill_budget -= take
            entries.append(self._entry(sequence, take))
        if self.num_preemptions == num_preempted:
            while prefill_budget > 0 and len(self._running) < self._max_sequences:
                admitted = self._admit(prefill_budget, now)
                if admitted is None:
                    break
                sequence, take = admitted
                prefill_budget -= take
                entries.append(self._entry(sequence, take))
        freed, self._freed = self._freed, []
        return StepPlan(entries, freed=freed)

    def update(self, plan: StepPlan, result: StepResult, seconds: float, now: float) -> list[TokenOutput]:
        """Take in a step's tokens; `seconds` is how long it took. Returns what to tell the callers."""
        outputs: list[TokenOutput] = []
        num_tokens = max(1, plan.num_tokens)
        for entry in plan.entries:
            sequence = self._sequences.get(entry.request_id)
            if sequence is None or sequence.status is not Status.RUNNING:
                continue  # aborted while the step ran
            sequence.num_computed = entry.start + len(entry.token_ids)
            self._publish_full_blocks(sequence)
            share = seconds * len(entry.token_ids) / num_tokens
            self._policy.on_service(sequence, len(entry.token_ids), share, now)
            if entry.request_id in result.prompt_logprobs:
                kept = self._prompt_logprobs.setdefault(entry.request_id, [None])
                kept.extend(result.prompt_logprobs[entry.request_id])
            if entry.samples:
                outputs.append(self._append(sequence, result, now))
        return outputs

    # -- queue ---------------------------------------------------------------------------------------------------

    def _enqueue(self, sequence: Sequence, now: float) -> None:
        sequence.status = Status.WAITING
        if sequence.residency is Residency.DEVICE:
            self._paused[sequence.request_id] = sequence
        item = _Queued(self._policy.rank(sequence, now), sequence.arrival_order, sequence)
        heapq.heappush(self._waiting, item)
        self._num_waiting += 1

    def _first_waiting(self) -> _Queued | None:
        while self._waiting and self._waiting[0].sequence.status is not Status.WAITING:
            heapq.heappop(self._waiting)
        return self._waiting[0] if self._waiting else None

    def _start_first(self) -> None:
        item = heapq.heappop(self._waiting)
        self._num_waiting -= 1
        self._paused.pop(item.sequence.request_id, None)
        item.sequence.status = Status.RUNNING
        bisect.insort(self._running, item, key=_order)

    def _stop_running(self, sequence: Sequence) -> None:
        self._running = [item for item in self._running if item.sequence is not sequence]

    def _pause_outranked(self, now: float) -> None:
        """While the batch is full, let the worst runners wait (with their KV) for better-ranked waiting sequences."""
        first = self._first_waiting()
        if len(self._running) < self._max_sequences or first is None or _order(first) >= _order(self._running[-1]):
            return
        for item in heapq.nsmallest(self._max_sequences, self._waiting, key=_order):
            if item.sequence.status is Status.WAITING:
                if _order(item) >= _order(self._running[-1]):
                    return
                self._enqueue(self._running.pop().sequence, now)
                if not self._running:
                    return

    # -- memory --------------------------------------------------------------------------------------------------

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_pool.block_size)

    def _admit(self, budget: int, now: float) -> tuple[Sequence, int] | None:
        """Start the first waiting sequence if its prompt fits in memory; None when there is none or it does not."""
        first = self._first_waiting()
        if first is None:
            return None
        sequence = first.sequence
        if sequence.residency is Residency.NONE and not self._place(sequence):
            return None
        self._start_first()
        take = min(sequence.num_remaining, budget)
        if not self._grow(sequence, take, now):
            return None
        if sequence.scheduled_time is None:
            sequence.scheduled_time = now
        return sequence, take

    def _place(self, sequence: Sequence) -> bool:
        """Take the cached prefix, if the whole prompt fits beside what the running sequences still need."""
        hashes = self._prefix_hashes(sequence)
        matched, from_free = self.block_pool.count_free_matches(hashes)
        needed = self._num_blocks(len(sequence.token_ids)) - matched + from_free
        for item in self._running:
            missing = self._num_blocks(len(item.sequence.token_ids)) - len(item.sequence.block_ids)
            needed += max(1, missing)
        while needed > self.block_pool.num_free and self._paused:
            self._drop(self._worst_paused())  # all of them rank behind the first waiting sequence
        if needed > self.block_pool.num_free:
            return False
        sequence.block_ids = self.block_pool.match_prefix(hashes)
        sequence.num_computed = len(sequence.block_ids) * self.block_pool.block_size
        sequence.num_published = len(sequence.block_ids)
        sequence.residency = Residency.DEVICE
        if sequence.scheduled_time is None:
            sequence.num_cached_tokens = sequence.num_computed
        return True

    def _grow(self, sequence: Sequence, take: int, now: float) -> bool:
        """Give `sequence` blocks for `take` more tokens, dropping worse-ranked holders if need be.

        Returns False when it was itself the worst and had to go back to the queue.
        """
        missing = self._num_blocks(sequence.num_computed + take) - len(sequence.block_ids)
        if missing <= 0:
            return True
        while (blocks := self.block_pool.allocate(missing)) is None:
            if self._paused:
                self._drop(self._worst_paused())
                continue
            victim = self._running.pop().sequence
            self._drop(victim)
            self._enqueue(victim, now)
            if victim is sequence:
                return False
        sequence.block_ids.extend(blocks)
        return True

    def _worst_paused(self) -> Sequence:
        holders = [item for item in self._waiting if self._paused.get(item.sequence.request_id) is item.sequence]
        return max(holders, key=_order).sequence

    def _drop(self, sequence: Sequence) -> None:
        """Free the blocks; the sequence will be computed again from its tokens."""
        self.block_pool.free(sequence.block_ids)
        sequence.block_ids = []
        sequence.num_computed = 0
        sequence.num_published = 0
        sequence.residency = Residency.NONE
        self._paused.pop(sequence.request_id, None)
        sequence.is_known = False
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._prompt_logprobs.pop(sequence.request_id, None)

    def _prefix_hashes(self, sequence: Sequence) -> list[bytes]:
        """Hashes of the leading full blocks, one token short of all: at least one token must be computed."""
        if not self.block_pool.prefix_caching or sequence.request.sampling.prompt_logprobs is not None:
            return []
        limit = (len(sequence.token_ids) - 1) // self.block_pool.block_size
        self._extend_hashes(sequence, limit)
        return sequence.block_hashes[:limit]

    def _extend_hashes(self, sequence: Sequence, num_blocks: int) -> None:
        size = self.block_pool.block_size
        hashes = sequence.block_hashes
        while len(hashes) < num_blocks:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else b""
            hashes.append(hash_block(parent, sequence.token_ids[start : start + size]))

    def _publish_full_blocks(self, sequence: Sequence) -> None:
        if not self.block_pool.prefix_caching:
            return
        num_full = sequence.num_computed // self.block_pool.block_size
        self._extend_hashes(sequence, num_full)
        for index in range(sequence.num_published, num_full):
            self.block_pool.publish(sequence.block_ids[index], sequence.block_hashes[index])
        sequence.num_published = max(sequence.num_published, num_full)

    # -- tokens --------------------------------------------------------------------------------------------------

    def _entry(self, sequence: Sequence, take: int) -> PlanEntry:
        start = sequence.num_computed
        is_known, sequence.is_known = sequence.is_known, True
        return PlanEntry(
            request_id=sequence.request_id,
            token_ids=sequence.token_ids[start : start + take],
            start=start,
            block_ids=list(sequence.block_ids),
            samples=start + take == len(sequence.token_ids),
            request=None if is_known else sequence.request,
            output_ids=[] if is_known else sequence.output_ids,
        )

    def _append(self, sequence: Sequence, result: StepResult, now: float) -> TokenOutput:
        request_id = sequence.request_id
        token_id = result.tokens[request_id]
        sequence.token_ids.append(token_id)
        output = TokenOutput(request_id, [token_id])
        if request_id in result.logprobs:
            output.logprobs = [result.logprobs[request_id]]
        if sequence.first_token_time is None:
            sequence.first_token_time = now
            output.num_cached_tokens = sequence.num_cached_tokens
            output.scheduled_time = sequence.scheduled_time or now
            if sequence.request.sampling.prompt_logprobs is not None:
                output.prompt_logprobs = self._prompt_logprobs.pop(request_id, [None])
        sampling = sequence.request.sampling
        is_end = not sampling.ignore_eos and token_id in self._eos_token_ids
        if is_end or token_id in sampling.stop_token_ids:
            output.finish_reason, output.stop_token_id = FINISH_STOP, token_id
        elif sequence.num_output == sampling.max_tokens or len(sequence.token_ids) >= self._max_model_len:
            output.finish_reason = FINISH_LENGTH
        if output.finish_reason is not None:
            self._finish(sequence)
        return output

    def _finish(self, sequence: Sequence) -> None:
        if sequence.status is Status.RUNNING:
            self._stop_running(sequence)
        else:
            self._num_waiting -= 1
            self._paused.pop(sequence.request_id, None)
        sequence.status = Status.FINISHED
        if sequence.residency is Residency.DEVICE:
            self.block_pool.free(sequence.block_ids)
            sequence.block_ids = []
            sequence.residency = Residency.NONE
        self._policy.on_finish(sequence)
        self._freed.append(sequence.request_id)
        self._prompt_logprobs.pop(sequence.request_id, None)
        del self._sequences[sequence.request_id]
