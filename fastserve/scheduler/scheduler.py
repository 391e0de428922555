"""Decide what to compute next: one token budget per step, decodes first, prefills in chunks.

`plan` picks sequences in the policy's order and gives each its tokens and blocks; `update` takes in what the step
made. There is no prefill/decode split: a plan is {sequence: number of tokens}. When blocks run out, the worst-ranked
holder is dropped: what the prefix cache or a lower tier (`tier_pool.py`) still has of it comes back when its turn is
near, the rest is computed again. Pure Python over integers; the clock is an argument.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from fastserve.core.request import (
    FINISH_ERROR,
    FINISH_LENGTH,
    FINISH_STOP,
    Request,
    TokenLogprobs,
    TokenOutput,
)
from fastserve.scheduler.beams import BeamGroup, BeamSearch
from fastserve.scheduler.block_pool import BlockPool, hash_block
from fastserve.scheduler.cost import CostModel, StepWork
from fastserve.scheduler.drafts import Drafter
from fastserve.scheduler.loads import Loads
from fastserve.scheduler.plan import PlanEntry, StepPlan
from fastserve.scheduler.policy import SchedulingPolicy
from fastserve.scheduler.queue import Ranked, WaitingQueue
from fastserve.scheduler.sequence import Residency, Sequence, Status
from fastserve.scheduler.turns import order_by_next_turn

_MEMORY = 0.02  # weight of the newest request in means
_IDLE_SHARE = 16  # with tiers, one block in so many is kept idle for those who arrive


@dataclass(slots=True)
class StepResult:
    """What the executor made of a plan.

    Attributes:
        tokens: request id -> sampled token, for entries with `samples`.
        further: request id -> the tokens after that one, where guesses were right.
        errors: request id -> why the request cannot go on; it has no token.
        logprobs: request id -> its log probabilities, where asked for, and those of beams (their token is not used).
        prompt_logprobs: request id -> log probabilities of prompt tokens start + 1 .. computed in this step.
        loaded: (block, whether it could be read, seconds) for blocks that came from a tier since the last step.
    """

    tokens: dict[str, int]
    logprobs: dict[str, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    loaded: list[tuple[int, bool, float]] = field(default_factory=list)
    further: dict[str, list[int]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


class Scheduler:
    """Owns the sequences and the blocks; writes status and residency.

    Args:
        block_pool: the KV blocks, with their tiers. They must hold at least one sequence of `max_model_len`.
        policy: order of service.
        max_batch_sequences, max_batch_tokens: limits of one step.
        max_model_len: longest sequence in tokens.
        eos_token_ids: the model's end tokens.
        cost: how long steps take; learns from each.
        target_tpot: seconds that a step with decoding sequences should take at most (prefills get what that leaves, a
            block at least), so that answers keep their pace; 0 for no such limit.
        drafter: guesses tokens to be verified; None for none.
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
        cost: CostModel | None = None,
        target_tpot: float = 0.0,
        drafter: Drafter | None = None,
    ) -> None:
        assert block_pool.num_blocks * block_pool.block_size >= max_model_len
        self.block_pool = block_pool
        self.cost = cost or CostModel()
        self.num_preemptions = 0
        self.num_pauses = 0
        self.num_recomputed_tokens = 0
        self._policy = policy
        self._drafter = drafter
        self._max_sequences = max_batch_sequences
        self._max_tokens = max_batch_tokens
        self._max_model_len = max_model_len
        self._target_tpot = target_tpot
        self._eos_token_ids = frozenset(eos_token_ids)
        self._sequences: dict[str, Sequence] = {}
        self._running: list[Ranked] = []
        self._pending: list[Ranked] = []  # inside `plan`: running ones not chosen yet, the worst first
        self._fresh = WaitingQueue(policy)  # waiting without memory
        self._paused = WaitingQueue(policy)  # waiting, but holding blocks
        self._loads = Loads()
        self._away: dict[str, Sequence] = {}  # in `_fresh`: lost their memory, but tiers may have the content
        self._may_place = True
        self._has_dropped = False
        self._planned_blocks = block_pool.num_blocks
        self._num_arrived = 0
        self._mean_prompt = 0.0  # tokens to compute, of late
        self._mean_output = 0.0
        self._num_finished = 0
        self._freed: list[str] = []
        self._copies: list[tuple[int, int]] = []  # in this plan; the sources are held until it is carried out
        self._prompt_logprobs: dict[str, list[TokenLogprobs | None]] = {}

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._fresh) + len(self._paused) + len(self._loads)

    @property
    def min_blocks(self) -> int:
        """The pool may not be smaller: the longest sequence must fit."""
        return self._num_blocks(self._max_model_len)

    @property
    def request_seconds(self) -> float:
        """Time of the engine that one request takes when the batch is full; 0 before any has finished."""
        if self._mean_output == 0.0:
            return 0.0
        decoding = self.cost.decode_seconds(self._mean_output, self._mean_prompt, self._max_sequences)
        return self.cost.prefill_seconds(int(self._mean_prompt)) + decoding

    def has_work(self) -> bool:
        return bool(self._sequences) or len(self._loads) > 0

    def resize(self, num_blocks: int) -> int:
        """Grow or shrink the pool, not below `min_blocks`; returns its size. Blocks that are held go when given up."""
        self.block_pool.resize(max(num_blocks, self.min_blocks))
        return self.block_pool.num_blocks

    def add(self, request: Request, now: float) -> None:
        """Take in a request. Its prompt must be shorter than max_model_len, its id new."""
        assert request.request_id not in self._sequences, "request id in use"
        assert 0 < len(request.prompt_ids) < self._max_model_len
        self._num_arrived += 1
        sequence = Sequence.from_request(request, self._num_arrived)
        if request.sampling.num_beams > 1:
            sampling, room = request.sampling, self._max_model_len - len(request.prompt_ids)
            end_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._eos_token_ids)
            search = BeamSearch(sampling, end_ids, min(room, sampling.max_tokens or room))
            sequence.group = BeamGroup(request.request_id, search, [sequence])
        self._sequences[request.request_id] = sequence
        sequence.num_cached_expected = self._count_cached(sequence)
        self._policy.on_arrival(sequence, now)
        self._fresh.push(sequence, now)

    def uses(self, adapter: str) -> bool:
        """Whether a live sequence has this adapter."""
        return any(sequence.request.adapter == adapter for sequence in self._sequences.values())

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop these requests and free what they hold; unknown ids are ignored (they may just have finished)."""
        for request_id in request_ids:
            sequence = self._sequences.get(request_id)
            if sequence is not None:
                for one in sequence.group.members if sequence.group is not None else [sequence]:
                    self._finish(one)

    def plan(self, now: float) -> StepPlan:
        """Choose the next step's work. An empty plan means that there is nothing to do."""
        self._fresh.review(now)
        self._paused.review(now)
        preemptive = self._policy.preemptive
        if preemptive:
            self._rank_running(now)
        self._pending, self._running = self._running[::-1], []  # the best is last
        self._may_place, self._has_dropped = True, False
        pending, running = self._pending, self._running
        tokens_left, decodes_left = self._token_budget(), sum(item.sequence.is_decoding for item in pending)
        entries: list[PlanEntry] = []
        skipped: list[Ranked] = []
        first = self._first_waiting(now)
        while len(running) < self._max_sequences:
            if pending and (not preemptive or first is None or pending[-1] < first):
                item = pending.pop()
                sequence = item.sequence
                decodes_left -= sequence.is_decoding
            elif first is not None:
                item, sequence = first, first.sequence
                if not self._start(item, now) and sequence.residency is not Residency.LOADING:
                    self._may_place = False  # those who hold memory may go on
                if sequence.status is not Status.RUNNING:
                    first = self._first_waiting(now)
                    continue
                first = self._first_waiting(now)
            else:
                break
            # Prefills take what is left when everyone who may still decode in this step keeps a token.
            keep = min(decodes_left + len(self._paused), self._max_sequences - len(running) - 1)
            take = min(sequence.num_remaining, tokens_left - keep)
            if take == 0 and preemptive:
                skipped.append(item)
                continue
            running.append(item)
            if take > 0 and self._grow(sequence, take, now):
                drafts = self._draft(sequence, tokens_left - take - keep) if self._drafter is not None else []
                tokens_left -= take + len(drafts)
                entries.append(self._entry(sequence, take, drafts))
            self._may_place = self._may_place and tokens_left > keep
            if not self._may_place:
                first = self._first_waiting(now)
        for item in (*skipped, *pending):
            self._pause(item.sequence, now)
        pending.clear()
        return self._finish_plan(entries, now)

    def _finish_plan(self, entries: list[PlanEntry], now: float) -> StepPlan:
        moves: list[tuple[int, int]] = []
        if self.block_pool.tiers is not None:
            self._move_ahead(now)
            moves = self.block_pool.tiers.take_moves()
        num_blocks = self.block_pool.num_reachable
        is_same, self._planned_blocks = num_blocks == self._planned_blocks, num_blocks
        freed, self._freed = self._freed, []
        return StepPlan(entries, self._copies, moves=moves, num_blocks=0 if is_same else num_blocks, freed=freed)

    def update(self, plan: StepPlan, result: StepResult, seconds: float, now: float) -> list[TokenOutput]:
        """Take in a step's tokens; `seconds` is how long it took. Returns what to tell the callers."""
        outputs: list[TokenOutput] = []
        shares = self.cost.account(plan, seconds)
        block_size = self.block_pool.block_size
        self.block_pool.free([source for source, _ in self._copies])
        self._copies = []
        searches: dict[BeamGroup, None] = {}
        for entry, share in zip(plan.entries, shares, strict=True):
            sequence = self._sequences.get(entry.request_id)
            if sequence is None or sequence.status is not Status.RUNNING:
                continue  # aborted while the step ran
            made = self._made(sequence, result) if entry.samples and sequence.group is None else []
            sequence.token_ids.extend(made[:-1])
            num_tokens = len(entry.token_ids) - entry.num_drafts + len(made[:-1])
            sequence.num_computed = entry.start + num_tokens
            if sequence.num_computed // block_size > sequence.num_published:
                self._publish_full_blocks(sequence)
            self._policy.on_service(sequence, num_tokens, share, now)
            if result.prompt_logprobs and entry.request_id in result.prompt_logprobs:
                kept = self._prompt_logprobs.setdefault(entry.request_id, [None])
                kept.extend(result.prompt_logprobs[entry.request_id])
            if entry.samples and sequence.group is not None:
                sequence.group.candidates[sequence.request_id] = result.logprobs[sequence.request_id]
                sequence.first_token_time = sequence.first_token_time or now
                searches[sequence.group] = None
            elif entry.samples:
                outputs.append(self._append(sequence, made, result, now))
        for group in searches:
            outputs += self._advance(group, now)
        for block_id, is_good, load_seconds in result.loaded:
            self._take_block(block_id, is_good, load_seconds, now)
        return outputs

    def _token_budget(self) -> int:
        """Tokens of this step: all that is allowed, or what `target_tpot` leaves beside those who decode."""
        if not self._target_tpot:
            return self._max_tokens
        contexts = [item.sequence.num_computed for item in self._pending if item.sequence.is_decoding]
        if not contexts:
            return self._max_tokens
        decoding = StepWork(decodes=len(contexts), decode_context=sum(contexts))
        spare = self._target_tpot - self.cost.coefficients.seconds(decoding)
        prefill = max(self.block_pool.block_size, self.cost.prefill_tokens_within(spare))
        decodes = min(self._max_sequences, len(contexts) + len(self._paused))
        return min(self._max_tokens, decodes + prefill)

    # -- queue ---------------------------------------------------------------------------------------------------

    def _rank_running(self, now: float) -> None:
        rank = self._policy.rank
        for index, item in enumerate(self._running):
            new = rank(item.sequence, now)
            if new != item.rank:
                self._running[index] = item._replace(rank=new)
        self._running.sort()

    def _first_waiting(self, now: float) -> Ranked | None:
        """The best of those who wait; only of those who hold memory once nothing more can be placed in this step."""
        paused = self._paused.first(now)
        fresh = self._fresh.first(now) if self._may_place else None
        if paused is None or fresh is None:
            return paused or fresh
        return min(paused, fresh)

    def _start(self, item: Ranked, now: float) -> bool:
        """Take a waiting sequence out of its queue, if its tokens so far fit in memory."""
        sequence = item.sequence
        if sequence.residency is Residency.DEVICE:
            self._paused.discard(sequence)
        elif not self._place(item, now) or sequence.residency is Residency.LOADING:
            return False
        sequence.status = Status.RUNNING
        self._policy.on_start(sequence, now)
        if sequence.scheduled_time is None:
            sequence.scheduled_time = now
        return True

    def _pause(self, sequence: Sequence, now: float) -> None:
        """Back to a queue; what it holds stays its own."""
        self.num_pauses += 1
        self._enqueue(sequence, now)

    def _enqueue(self, sequence: Sequence, now: float) -> None:
        sequence.status = Status.WAITING
        queue = self._paused if sequence.residency is Residency.DEVICE else self._fresh
        queue.push(sequence, now)

    # -- memory --------------------------------------------------------------------------------------------------

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_pool.block_size)

    def _place(self, item: Ranked, now: float, num_spare: int = 0) -> bool:
        """Take a sequence out of `_fresh` and give it the cached prefix, or start to load it, if all its tokens so far
        fit beside what those who hold memory still need (and `num_spare` blocks)."""
        sequence = item.sequence
        hashes = self._prefix_hashes(sequence)
        matched, from_free = self.block_pool.count_free_matches(hashes)
        needed = self._num_blocks(len(sequence.token_ids)) - matched + from_free + num_spare
        for other in (*(item.sequence for item in (*self._running, *self._pending)), *self._loads.sequences()):
            needed += max(1, self._num_blocks(len(other.token_ids)) - len(other.block_ids))
        while needed > self.block_pool.num_free:
            victim = self._worst_holder() if self._may_evict and not num_spare else None
            if victim is None or victim < item:
                return False
            self._drop(victim.sequence, now)
        sequence.block_ids = self.block_pool.match_prefix(hashes)
        self._fresh.discard(sequence)
        self._away.pop(sequence.request_id, None)
        if not self._load(sequence, hashes):
            self._settle(sequence)
        return True

    @property
    def _may_evict(self) -> bool:
        """With tiers, order may take memory from others: little of what was computed is lost."""
        return self._policy.evicts or (self._policy.preemptive and self.block_pool.tiers is not None)

    def _load(self, sequence: Sequence, hashes: list[bytes]) -> bool:
        """Fetch what follows the blocks at hand from the tiers, when that is quicker than computing it."""
        pool, tiers, first = self.block_pool, self.block_pool.tiers, len(sequence.block_ids)
        found = tiers.count(hashes[first:]) if tiers is not None else 0
        if tiers is None or found == 0:
            return False
        seconds = tiers.seconds(hashes[first : first + found]) * (1 + self._loads.num_blocks / found)
        if seconds > self.cost.prefill_seconds(found * pool.block_size, first * pool.block_size):
            return False
        blocks = pool.allocate(found)
        assert blocks is not None
        found = tiers.count(hashes[first : first + found])  # making room may have cost us some
        pool.free(blocks[found:])
        if found == 0:
            return False
        for block_hash, block_id in zip(hashes[first:], blocks[:found], strict=False):
            tiers.restore(block_hash, block_id)
        sequence.block_ids.extend(blocks[:found])
        sequence.residency = Residency.LOADING
        self._loads.begin(sequence, first)
        return True

    def _take_block(self, block_id: int, is_good: bool, seconds: float, now: float) -> None:
        """A block came from a tier. When it was a sequence's last, the sequence may go on from the first bad one."""
        pool, sequence = self.block_pool, self._loads.find(block_id).sequence
        assert pool.tiers is not None
        pool.tiers.restored(sequence.block_hashes[sequence.block_ids.index(block_id)], is_good, seconds)
        load = self._loads.arrive(block_id, is_good)
        if load is None:
            return
        if sequence.status is Status.FINISHED:
            pool.free(sequence.block_ids)
            sequence.block_ids, sequence.residency = [], Residency.NONE
            return
        num_good = load.num_good
        pool.free(sequence.block_ids[num_good:])
        del sequence.block_ids[num_good:]
        for index in range(load.first, num_good):
            pool.publish(sequence.block_ids[index], sequence.block_hashes[index])
        self._settle(sequence)
        self._paused.push(sequence, now)

    def _settle(self, sequence: Sequence) -> None:
        """Its blocks hold what they will before it is computed."""
        sequence.residency = Residency.DEVICE
        sequence.num_published = len(sequence.block_ids)
        sequence.num_computed = sequence.num_published * self.block_pool.block_size
        self.num_recomputed_tokens += max(0, sequence.num_lost - sequence.num_computed)
        sequence.num_lost = 0
        if self.block_pool.prefix_caching and sequence.scheduled_time is None:
            sequence.num_cached_tokens = sequence.num_computed
        if self.block_pool.prefix_caching:
            self.block_pool.num_queries += len(self._prefix_hashes(sequence)) * self.block_pool.block_size
            self.block_pool.num_hits += sequence.num_computed

    def _move_ahead(self, now: float) -> None:
        """Take the memory of those whose turn is far, so that some blocks are idle; or start to bring back the one
        whose turn is nearest. Never both: what goes out and in within a step moved for nothing."""
        pool = self.block_pool
        num_idle = pool.num_blocks // _IDLE_SHARE
        if self._policy.preemptive and pool.num_free < num_idle and len(self._paused) > 0:
            for item in reversed(self._by_next_turn(self._paused.items(), now)):
                self._drop(item.sequence, now)
                if pool.num_free >= num_idle:
                    return
        elif self._away and not self._has_dropped and pool.num_free > num_idle:
            nearest = self._by_next_turn(self._fresh.items(self._away), now)[0]
            if self._place(nearest, now, 1 + num_idle) and nearest.sequence.residency is Residency.DEVICE:
                self._paused.push(nearest.sequence, now)

    def _by_next_turn(self, candidates: Iterable[Ranked], now: float) -> list[Ranked]:
        ahead = (*self._running, *self._paused.items())
        return order_by_next_turn(candidates, ahead, self._policy, self._max_sequences, now)

    def _grow(self, sequence: Sequence, take: int, now: float) -> bool:
        """Give `sequence` blocks for `take` more tokens, dropping worse-ranked holders if need be.

        Returns False when it was itself the worst and had to go back to the queue, or must wait. Nothing new is placed
        in a step that dropped for this reason.
        """
        held, pool = sequence.block_ids, self.block_pool
        first = sequence.num_computed // pool.block_size  # the first that is written
        is_shared = sequence.group is not None and first < len(held) and self._is_shared(held[first])
        if sequence.num_computed + take <= len(held) * pool.block_size and not is_shared:
            return True
        missing = max(0, self._num_blocks(sequence.num_computed + take) - len(held)) + is_shared
        while (blocks := pool.allocate(missing)) is None:
            self._may_place = False
            victim = self._worst_holder()
            if victim is None and len(self._loads) > 0:
                return False  # it waits in its place: those who load will be victims when they have arrived
            if victim is None:
                self._running.pop()  # it was chosen last
                self._drop(sequence, now)
                return False
            self._drop(victim.sequence, now)
        if is_shared:
            self._copies.append((held[first], blocks[-1]))
            held[first] = blocks.pop()
            sequence.is_known = False
        held.extend(blocks)
        return True

    def _is_shared(self, block_id: int) -> bool:
        """Whether others will read this block after this plan is carried out."""
        return self.block_pool.num_holders(block_id) - sum(source == block_id for source, _ in self._copies) > 1

    def _worst_holder(self) -> Ranked | None:
        """The worst-ranked sequence with blocks that this step has not chosen."""
        worst = self._paused.last()
        if self._pending and (worst is None or worst < self._pending[0]):
            worst = self._pending[0]
        return worst

    def _drop(self, sequence: Sequence, now: float) -> None:
        """Free the blocks; the sequence waits, and what is gone when it returns is computed again from its tokens."""
        self._give_up(sequence)
        self._has_dropped = True
        if self._pending and self._pending[0].sequence is sequence:
            del self._pending[0]
        self._paused.discard(sequence)
        self._pause(sequence, now)

    def _give_up(self, sequence: Sequence) -> None:
        """Free the blocks of a sequence that goes on later."""
        self.block_pool.free(sequence.block_ids)
        sequence.num_lost = sequence.num_computed
        sequence.num_cached_expected = 0
        if self.block_pool.tiers is not None:
            sequence.num_cached_expected = sequence.num_published * self.block_pool.block_size
            self._away[sequence.request_id] = sequence
        sequence.block_ids = []
        sequence.num_computed = 0
        sequence.num_published = 0
        sequence.residency = Residency.NONE
        sequence.is_known = False
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._prompt_logprobs.pop(sequence.request_id, None)

    def _prefix_hashes(self, sequence: Sequence) -> list[bytes]:
        """Hashes of the leading full blocks, one token short of all: at least one token must be computed."""
        if not self.block_pool.is_findable or sequence.request.sampling.prompt_logprobs is not None:
            return []
        limit = (len(sequence.token_ids) - 1) // self.block_pool.block_size
        self._extend_hashes(sequence, limit)
        return sequence.block_hashes[:limit]

    def _count_cached(self, sequence: Sequence) -> int:
        """Leading tokens that need not be computed."""
        hashes = self._prefix_hashes(sequence)
        matched, _ = self.block_pool.count_free_matches(hashes)
        if self.block_pool.tiers is not None:
            matched += self.block_pool.tiers.count(hashes[matched:])
        return matched * self.block_pool.block_size

    def _extend_hashes(self, sequence: Sequence, num_blocks: int) -> None:
        size = self.block_pool.block_size
        hashes = sequence.block_hashes
        root = sequence.request.adapter if self.block_pool.prefix_caching else sequence.request_id
        while len(hashes) < num_blocks:
            start = len(hashes) * size
            parent = hashes[-1] if hashes else root.encode()
            hashes.append(hash_block(parent, sequence.token_ids[start : start + size]))

    def _publish_full_blocks(self, sequence: Sequence) -> None:
        if not self.block_pool.is_findable:
            return
        num_full = sequence.num_computed // self.block_pool.block_size
        self._extend_hashes(sequence, num_full)
        for index in range(sequence.num_published, num_full):
            self.block_pool.publish(sequence.block_ids[index], sequence.block_hashes[index])
        sequence.num_published = max(sequence.num_published, num_full)

    # -- beams ---------------------------------------------------------------------------------------------------

    def _advance(self, group: BeamGroup, now: float) -> list[TokenOutput]:
        """New beams of a search whose beams have all found their next tokens; those that must wait give up their
        memory (what is cached of it comes back)."""
        if not group.is_complete:
            for member in group.members:
                if member.request_id in group.candidates and member.status is Status.RUNNING:
                    self._stop_running(member)
                    self._give_up(member)
            return []
        root = group.members[0]
        kept = group.advance()
        if not kept:
            for member in group.members:
                self._finish(member)
            answers = group.search.answers()
            return [
                TokenOutput(
                    group.request_id,
                    [],
                    answers[0].finish_reason,
                    num_cached_tokens=root.num_cached_tokens,
                    scheduled_time=root.scheduled_time or now,
                    beams=answers,
                )
            ]
        self._fork(group, kept, now)
        return []

    def _fork(self, group: BeamGroup, kept: list[tuple[int, int]], now: float) -> None:
        """Make the members the new beams: an old beam that goes on keeps its sequence, one that goes on twice gets that
        of one that does not, or a new one."""
        old, first_of = group.members, {parent: place for place, (parent, _) in reversed([*enumerate(kept)])}
        spare = [member for index, member in enumerate(old) if index not in first_of]
        group.members = []
        for place, (parent, _) in enumerate(kept):
            member = old[parent]
            if first_of[parent] != place:
                member = spare.pop() if spare else self._new_beam(group, old[parent], now)
                self.block_pool.free(member.block_ids)
                member.take_over(old[parent])
                self.block_pool.share(member.block_ids)
            group.members.append(member)
        assert not spare, "a search that goes on has all its beams"
        for member, (_, token_id) in zip(group.members, kept, strict=True):
            member.token_ids.append(token_id)
            if member.status is Status.WAITING or member.residency is not Residency.DEVICE:
                self._stop_running(member)
                self._enqueue(member, now)

    def _new_beam(self, group: BeamGroup, parent: Sequence, now: float) -> Sequence:
        request_id = f"{group.request_id}+beam-{group.num_made}"
        request = msgspec.structs.replace(parent.request, request_id=request_id)
        order = int(parent.arrival_order) + group.num_made / 1024  # behind each other, before the next request
        group.num_made += 1
        sequence = self._sequences[request_id] = Sequence.from_request(request, order)
        sequence.group, sequence.scheduled_time, sequence.first_token_time = group, parent.scheduled_time, now
        sequence.num_cached_tokens = parent.num_cached_tokens
        self._policy.on_arrival(sequence, now)
        return sequence

    def _stop_running(self, sequence: Sequence) -> None:
        if sequence.status is Status.RUNNING:
            self._running = [item for item in self._running if item.sequence is not sequence]
            sequence.status = Status.WAITING

    # -- tokens --------------------------------------------------------------------------------------------------

    def _draft(self, sequence: Sequence, room: int) -> list[int]:
        """Guesses for a sequence that decodes: at most `room`, within its limits, into blocks that nobody needs."""
        sampling = sequence.request.sampling
        if not sequence.is_decoding or sampling.logprobs is not None or sequence.group or self._drafter is None:
            return []
        num_tokens = len(sequence.token_ids)
        room = min(room, self._max_model_len - num_tokens - 1)
        if sampling.max_tokens is not None:
            room = min(room, sampling.max_tokens - sequence.num_output - 1)
        drafts = self._drafter.propose(sequence, room, len(self._running))
        missing = self._num_blocks(num_tokens + len(drafts)) - len(sequence.block_ids)
        if drafts and missing > 0:
            # The others may each need a block in this step; guesses take none of those.
            blocks = None
            if self.block_pool.num_free >= missing + len(self._pending) + self._max_sequences:
                blocks = self.block_pool.allocate(missing)
            sequence.block_ids.extend(blocks or ())
        return drafts[: len(sequence.block_ids) * self.block_pool.block_size - num_tokens]

    def _entry(self, sequence: Sequence, take: int, drafts: list[int]) -> PlanEntry:
        start = sequence.num_computed
        is_known, sequence.is_known = sequence.is_known, True
        return PlanEntry(
            sequence.request_id,
            sequence.token_ids[start : start + take] + drafts,
            start,
            sequence.block_ids[:],
            start + take == len(sequence.token_ids),
            None if is_known else sequence.request,
            [] if is_known else sequence.output_ids,
            len(drafts),
        )

    def _made(self, sequence: Sequence, result: StepResult) -> list[int]:
        """The step's tokens of a sequence, up to the first that ends it; none when it cannot go on."""
        request_id = sequence.request_id
        if request_id in result.errors:
            return []
        made = [result.tokens[request_id], *result.further.get(request_id, ())]
        for place, token_id in enumerate(made[:-1]):
            if self._ends(sequence, token_id):
                return made[: place + 1]
        return made

    def _ends(self, sequence: Sequence, token_id: int) -> bool:
        sampling = sequence.request.sampling
        is_end = not sampling.ignore_eos and token_id in self._eos_token_ids
        return is_end or token_id in sampling.stop_token_ids

    def _append(self, sequence: Sequence, made: list[int], result: StepResult, now: float) -> TokenOutput:
        request_id = sequence.request_id
        if not made:
            self._finish(sequence)
            return TokenOutput(request_id, [], FINISH_ERROR, error=result.errors[request_id])
        token_id = made[-1]
        sequence.token_ids.append(token_id)
        output = TokenOutput(request_id, made)
        if request_id in result.logprobs:
            output.logprobs = [result.logprobs[request_id]]
        if sequence.first_token_time is None:
            sequence.first_token_time = now
            output.num_cached_tokens = sequence.num_cached_tokens
            output.scheduled_time = sequence.scheduled_time or now
            if sequence.request.sampling.prompt_logprobs is not None:
                output.prompt_logprobs = self._prompt_logprobs.pop(request_id, [None])
        sampling = sequence.request.sampling
        if self._ends(sequence, token_id):
            output.finish_reason, output.stop_token_id = FINISH_STOP, token_id
        elif sequence.num_output == sampling.max_tokens or len(sequence.token_ids) >= self._max_model_len:
            output.finish_reason = FINISH_LENGTH
        if output.finish_reason is not None:
            self._finish(sequence)
        return output

    def _finish(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        self._fresh.discard(sequence)
        self._paused.discard(sequence)
        self._away.pop(sequence.request_id, None)
        sequence.status = Status.FINISHED
        if sequence.residency is Residency.DEVICE:
            self.block_pool.free(sequence.block_ids)
            sequence.block_ids = []
            sequence.residency = Residency.NONE
        self._policy.on_finish(sequence)
        if sequence.num_output > 0:
            self._num_finished += 1
            weight = max(_MEMORY, 1.0 / self._num_finished)
            self._mean_output += weight * (sequence.num_output - self._mean_output)
            self._mean_prompt += weight * (sequence.num_prompt - sequence.num_cached_tokens - self._mean_prompt)
        if self._drafter is not None:
            self._drafter.forget(sequence.request_id)
        self._freed.append(sequence.request_id)
        self._prompt_logprobs.pop(sequence.request_id, None)
        del self._sequences[sequence.request_id]
