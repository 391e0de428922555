"""Decide what to compute next: one token budget per step, decodes first, prefills in chunks.

`plan` picks sequences in the policy's order and gives each its tokens and blocks; `update` takes in what the step
made. There is no prefill/decode split: a plan is {sequence: number of tokens}. When blocks run out, the worst-ranked
holder is dropped: what the prefix cache or a lower tier (`tier_pool.py`) still has of it comes back when its turn is
near, the rest is computed again. Pure Python over integers; the clock is an argument.
"""

from __future__ import annotations

from collections.abc import Iterable

from fastserve.core.request import Request, TokenOutput
from fastserve.scheduler.answers import Answers
from fastserve.scheduler.beams import BeamGroup, BeamSearch
from fastserve.scheduler.block_pool import BlockPool
from fastserve.scheduler.cost import CostModel, StepWork
from fastserve.scheduler.drafts import Drafter
from fastserve.scheduler.loads import Loads
from fastserve.scheduler.plan import PlanEntry, StepPlan, StepResult
from fastserve.scheduler.policy import SchedulingPolicy, rank_of
from fastserve.scheduler.queue import Ranked, WaitingQueue, order_by_next_turn
from fastserve.scheduler.sequence import Residency, Sequence, Status

_MOVING_SHARE = 1 / 40  # of a sequence's time in steps that moving it for order's sake may cost
_CHUNK_SECONDS, _CHUNK_SHARE = 0.05, 4  # prompts beside those who decode: seconds, or times the fixed part of a step
_IDLE_SHARE = 16  # with tiers, one block in so many is kept idle for those who arrive


class Scheduler:
    """Owns the sequences and the blocks; writes status and residency.

    Args:
        block_pool: the KV blocks, with their tiers. They must hold at least one sequence of `max_model_len`.
        policy: order of service.
        max_batch_sequences, max_batch_tokens: limits of one step.
        max_model_len: longest sequence in tokens.
        eos_token_ids: the model's end tokens.
        cost: how long steps take; learns from each.
        target_tpot: seconds that a step with decoding sequences should take at most: prefills get what that leaves, a
            block at least. 0: what they get is what hides a step's fixed time.
        drafter: guesses tokens to be verified; None for none.
        burst_seconds: how long a plan of several rounds may take.
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
        burst_seconds: float = 0.0,
    ) -> None:
        assert block_pool.num_blocks * block_pool.block_size >= max_model_len
        self.block_pool = block_pool
        self.cost = cost or CostModel()
        self.num_preemptions = 0
        self.num_pauses = 0
        self.num_recomputed_tokens = 0
        self.num_drafts = 0
        self.num_drafts_right = 0
        self._policy = policy
        self._drafter = drafter
        self._max_sequences = max_batch_sequences
        self._max_tokens = max_batch_tokens
        self._max_model_len = max_model_len
        self._target_tpot = target_tpot
        self._burst_seconds = burst_seconds
        self._answers = Answers(eos_token_ids)
        self._sequences: dict[str, Sequence] = {}
        self._running: list[Ranked] = []
        self._pending: list[Ranked] = []  # inside `plan`: running ones not chosen yet, the worst first
        self._fresh = WaitingQueue(policy)  # waiting without memory
        self._paused = WaitingQueue(policy)  # waiting, but holding blocks
        self._loads = Loads(block_pool, self.cost)
        self._away: dict[str, Sequence] = {}  # in `_fresh`: lost their memory, but tiers may have the content
        self._may_place, self._has_dropped = True, False
        self._charges = type(policy).on_service is not SchedulingPolicy.on_service
        self._planned_blocks = block_pool.num_blocks
        self._num_arrived = 0
        self._freed: list[str] = []
        self._copies: list[tuple[int, int]] = []  # in this plan; the sources are held until it is carried out

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
        prompt, output = self._answers.mean_prompt, self._answers.mean_output
        return self.cost.prefill_seconds(int(prompt)) + self.cost.decode_seconds(output, prompt, self._max_sequences)

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
        sequence.num_together = self._num_blocks(request.num_source) * self.block_pool.block_size
        sampling, room = request.sampling, self._max_model_len - sequence.num_prompt
        sequence.end_ids = self._answers.end_ids(sampling)
        sequence.max_length = sequence.num_prompt + min(room, sampling.max_tokens or room)
        if sampling.num_beams > 1:
            # Of an encoder-decoder, what comes after the first token counts as the answer's.
            num_before = len(request.prompt_ids) - sequence.num_together - 1 if request.num_source else 0
            search = BeamSearch(sampling, sequence.end_ids, sequence.max_length - sequence.num_prompt, num_before)
            sequence.group = BeamGroup(request.request_id, search, [sequence])
        sequence.num_cached_expected = self.block_pool.count_cached(sequence)
        self._arrive(sequence, now)
        self._fresh.push(sequence, now)

    def _arrive(self, sequence: Sequence, now: float) -> None:
        self._sequences[sequence.request_id] = sequence
        self._policy.on_arrival(sequence, now)

    def draftable(self, num_drafts: int) -> list[Sequence]:
        """Running sequences that may have guesses, with blocks for so many tokens more where those are idle."""
        found = [item.sequence for item in self._running if self._may_draft(item.sequence)]
        for sequence in found:
            self._reserve(sequence, min(len(sequence.token_ids) + num_drafts, self._max_model_len))
        return found

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
        pending, running = self._pending, self._running
        tokens_left, block_size, is_plain = self._max_tokens, self.block_pool.block_size, self._drafter is None
        decodes_left = sum([len(item.sequence.token_ids) - item.sequence.num_computed == 1 for item in pending])
        prefill_left = self._prefill_budget(decodes_left) if decodes_left else tokens_left
        num_kept = min(decodes_left + len(self._paused), self._max_sequences - 1)
        self._may_place, self._has_dropped = tokens_left > num_kept, False
        entries: list[PlanEntry] = []
        skipped: list[Ranked] = []
        first = self._first_waiting(now)
        places_left = self._max_sequences
        while places_left > 0:
            if pending and (not preemptive or first is None or pending[-1] < first):
                item = pending.pop()
                sequence = item.sequence
                decodes_left -= len(sequence.token_ids) - sequence.num_computed == 1
            elif first is not None:
                item, sequence = first, first.sequence
                has_place = min(sequence.num_places, self._max_sequences) <= places_left
                has_place |= sequence.residency is Residency.DEVICE
                if not (has_place and self._start(item, now)) and sequence.residency is not Residency.LOADING:
                    self._may_place = False  # those who hold memory may go on
                if sequence.status is not Status.RUNNING:
                    first = self._first_waiting(now)
                    continue
                first = self._first_waiting(now)
            else:
                break
            start = sequence.num_computed
            decodes = sequence.is_known and len(sequence.token_ids) - start == 1 and sequence.group is None
            if decodes and is_plain and tokens_left > 0 and start < len(sequence.block_ids) * block_size:
                # What most of a step is: one who decodes, whose token was kept. Nothing else changes.
                tokens_left -= 1
                places_left -= 1
                running.append(item)
                last, block_ids = sequence.token_ids[-1:], sequence.block_ids[:]
                entries.append(PlanEntry(sequence.request_id, last, start, block_ids, True))
                continue
            # Prefills take what is left when everyone who may still decode in this step keeps a token.
            keep = min(decodes_left + len(self._paused), self._max_sequences - len(running) - 1)
            take, is_prefill = sequence.num_remaining, sequence.num_remaining > 1
            if is_prefill and take > prefill_left * (1.0 if self._target_tpot else 1.5):  # more beats one step more
                take = prefill_left
            take = min(take, tokens_left - keep)
            if take > 0:
                take = max(take, sequence.num_together - sequence.num_computed)
            if take <= 0 and preemptive:
                skipped.append(item)
                continue
            running.append(item)
            places_left -= sequence.num_places
            if take > 0 and self._grow(sequence, take, now):
                drafts = self._draft(sequence, tokens_left - take - keep)
                tokens_left -= take + len(drafts)
                prefill_left -= take * is_prefill
                self.num_drafts += len(drafts)
                entries.append(self._entry(sequence, take, drafts))
            self._may_place = self._may_place and tokens_left > keep and prefill_left > 0
            if not self._may_place and first is not None and first.sequence.residency is not Residency.DEVICE:
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
        return StepPlan(entries, self._copies, moves, 0 if is_same else num_blocks, freed, self._num_rounds(entries))

    def _num_rounds(self, entries: list[PlanEntry]) -> int:
        """How often to run the plan before somebody has to decide: an answer ends, a block is full, or time is up."""
        if not (self._burst_seconds and entries) or len(entries) < len(self._sequences) or len(self._loads):
            return 1
        work = StepWork(0, len(entries), 0, sum(entry.start for entry in entries))
        rounds = int(self._burst_seconds / max(self.cost.coefficients.seconds(work), 1e-6))
        for entry in entries if rounds > 1 else ():
            sequence, sampling = self._sequences[entry.request_id], self._sequences[entry.request_id].request.sampling
            if not self._may_draft(sequence) or entry.num_drafts or sampling.structured_outputs is not None:
                return 1
            room = self.block_pool.block_size - entry.start % self.block_pool.block_size
            rounds = min(rounds, room, sequence.max_length - len(sequence.token_ids))
        return max(rounds, 1)

    def update(self, plan: StepPlan, result: StepResult, seconds: float, now: float) -> list[TokenOutput]:
        """Take in a step's tokens; `seconds` is how long it took. Returns what to tell the callers."""
        outputs: list[TokenOutput] = []
        shares = self.cost.account(plan, seconds, result.num_rounds)
        answers, block_size = self._answers, self.block_pool.block_size
        self.block_pool.free([source for source, _ in self._copies])
        self._copies = []
        searches: dict[BeamGroup, None] = {}
        for entry, share in zip(plan.entries, shares, strict=True):
            sequence = self._sequences.get(entry.request_id)
            if sequence is None or sequence.status is not Status.RUNNING:
                continue  # aborted while the step ran
            num_tokens = len(entry.token_ids) - entry.num_drafts
            made: list[int] = []
            if entry.num_drafts or result.num_rounds > 1:
                made = answers.made(sequence, result)
                sequence.token_ids += made[:-1]
                num_tokens += len(made[:-1])
                self.num_drafts_right += min(len(made[:-1]), entry.num_drafts)
            sequence.num_computed = entry.start + num_tokens
            if sequence.num_computed // block_size > sequence.num_published:
                self.block_pool.publish_computed(sequence)
            sequence.served += share
            if self._charges:
                self._policy.on_service(sequence, num_tokens, share, now)
            if result.prompt_logprobs and entry.request_id in result.prompt_logprobs:
                sequence.prompt_logprobs.extend(result.prompt_logprobs[entry.request_id])
            if entry.samples and sequence.group is None:
                output = answers.append(sequence, made, result, now)
                outputs.append(output)
                if output.finish_reason is not None:
                    self._finish(sequence)
            elif entry.samples and sequence.group is not None:
                sequence.group.candidates[sequence.request_id] = result.logprobs[sequence.request_id]
                sequence.first_token_time = sequence.first_token_time or now
                searches[sequence.group] = None
        for group in searches:
            outputs += self._advance(group, now)
        for block_id, is_good, load_seconds in result.loaded:
            loaded = self._loads.arrive(block_id, is_good, load_seconds)
            if loaded is not None:
                self._settle(loaded)
                self._paused.push(loaded, now)
        return outputs

    def _prefill_budget(self, num_decoding: int) -> int:
        """Prompt tokens of a step in which others decode: as many as hide its fixed time, or `target_tpot` leaves."""
        if self._target_tpot:
            context = sum(item.sequence.num_computed for item in self._pending if item.sequence.is_decoding)
            spare = self._target_tpot - self.cost.coefficients.seconds(StepWork(0, num_decoding, 0, context))
        else:
            num_prompts = len(self._sequences) - num_decoding - len(self._paused)
            spare = max(_CHUNK_SECONDS, _CHUNK_SHARE * self.cost.coefficients.step) * max(1.0, num_prompts / 2)
        return max(self.block_pool.block_size, int(spare / max(self.cost.coefficients.prefill_token, 1e-9)))

    # -- queue ---------------------------------------------------------------------------------------------------

    def _rank_running(self, now: float) -> None:
        policy, is_sorted = self._policy, True
        for index, (old, order, version, sequence) in enumerate(self._running):
            num_tokens = len(sequence.token_ids)
            if num_tokens < sequence.rank_until and num_tokens - sequence.num_computed == 1:
                continue
            new = rank_of(policy, sequence, now)
            if new != old:
                self._running[index], is_sorted = Ranked(new, order, version, sequence), False
            else:
                stable = 0 if sequence.group is not None else policy.stable_tokens(sequence)
                sequence.rank_until = num_tokens + stable
        if not is_sorted:
            self._running.sort()

    def _first_waiting(self, now: float) -> Ranked | None:
        """The best of those who wait; only of those who hold memory once nothing more can be placed in this step."""
        paused = self._paused.first(now)
        fresh = self._fresh.first(now) if self._may_place else None
        return min(paused, fresh) if paused is not None and fresh is not None else paused or fresh

    def _start(self, item: Ranked, now: float) -> bool:
        """Take a waiting sequence out of its queue, if its tokens so far fit in memory."""
        sequence = item.sequence
        if sequence.residency is Residency.DEVICE:
            self._paused.discard(sequence)
        elif not self._place(item, now) or sequence.residency is Residency.LOADING:
            return False
        sequence.status = Status.RUNNING
        self._policy.on_start(sequence, now)
        sequence.scheduled_time = now if sequence.scheduled_time is None else sequence.scheduled_time
        return True

    def _pause(self, sequence: Sequence, now: float) -> None:
        """Back to a queue; what it holds stays its own."""
        self.num_pauses += 1
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
        hashes = self.block_pool.prefix_hashes(sequence)
        while self._num_needed(sequence, hashes) + num_spare > self.block_pool.num_free:
            victim = self._worst_holder() if not num_spare else None
            if victim is None or victim < item or not self._may_evict(victim.sequence):
                return False
            self._drop(victim.sequence, now)
        sequence.block_ids = self.block_pool.match_prefix(hashes)
        self._fresh.discard(sequence)
        self._away.pop(sequence.request_id, None)
        if not self._loads.begin(sequence, hashes):
            self._settle(sequence)
        return True

    def _num_needed(self, sequence: Sequence, hashes: list[bytes]) -> int:
        """Free blocks that it would take, and those who hold memory for their tokens so far."""
        matched, from_free = self.block_pool.count_free_matches(hashes)
        others = [*self._running, *self._pending]
        prompts = [item.sequence for item in others if not item.sequence.is_decoding]  # the others take one each
        needed = self._num_blocks(len(sequence.token_ids)) - matched + from_free + len(others) - len(prompts)
        for other in (*prompts, *self._loads.sequences()):
            needed += max(1, self._num_blocks(len(other.token_ids)) - len(other.block_ids))
        return needed

    def _may_evict(self, sequence: Sequence) -> bool:
        """Whether order may take its memory. With tiers little that was computed is lost, but going out and back takes
        time: that must be little beside its time in steps since it came, or all would move and none get anywhere."""
        tiers = self.block_pool.tiers
        if tiers is None or self._policy.evicts or not self._policy.preemptive:
            return self._policy.evicts
        return 2 * len(sequence.block_ids) * tiers.first.seconds_per_block <= _MOVING_SHARE * sequence.served

    def _settle(self, sequence: Sequence) -> None:
        """Its blocks hold what they will before it is computed."""
        sequence.residency = Residency.DEVICE
        sequence.num_published = len(sequence.block_ids)
        sequence.num_computed = sequence.num_published * self.block_pool.block_size
        self.num_recomputed_tokens += max(0, sequence.num_lost - sequence.num_computed)
        sequence.num_lost, sequence.served = 0, 0.0
        if self.block_pool.prefix_caching and sequence.scheduled_time is None:
            sequence.num_cached_tokens = sequence.num_computed
        if self.block_pool.prefix_caching:
            self.block_pool.num_queries += len(self.block_pool.prefix_hashes(sequence)) * self.block_pool.block_size
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
        if sequence.group is None and sequence.num_computed + take <= len(held) * pool.block_size:
            return True
        first = sequence.num_computed // pool.block_size  # the first that is written
        added = max(0, self._num_blocks(sequence.num_computed + take) - len(held))
        while True:
            # A block that other beams read, too, is copied; dropping one of them may have made it this one's own.
            is_shared = sequence.group is not None and first < len(held) and self._is_shared(held[first])
            blocks = pool.allocate(added + is_shared)
            if blocks is not None:
                break
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
        if self.block_pool.tiers is not None:
            sequence.num_cached_expected = sequence.num_published * self.block_pool.block_size
            self._away[sequence.request_id] = sequence
        sequence.num_published = 0
        self._has_dropped = True
        if self._pending and self._pending[0].sequence is sequence:
            del self._pending[0]
        self._paused.discard(sequence)
        self._pause(sequence, now)

    def _give_up(self, sequence: Sequence) -> None:
        """Free the blocks of a sequence that goes on later."""
        self.block_pool.free(sequence.block_ids)
        sequence.num_lost = sequence.num_computed
        sequence.block_ids, sequence.num_computed, sequence.num_cached_expected = [], 0, 0
        sequence.residency = Residency.NONE
        sequence.is_known = False
        sequence.num_preemptions += 1
        sequence.prompt_logprobs = [None]
        self.num_preemptions += 1

    # -- beams ---------------------------------------------------------------------------------------------------

    def _advance(self, group: BeamGroup, now: float) -> list[TokenOutput]:
        """New beams of a search whose beams have all found their next tokens; those that must wait give up their
        memory (what is cached of it comes back)."""
        if not group.is_complete:
            for member in group.members:
                if member.request_id in group.candidates and member.status is Status.RUNNING:
                    self._stop_running(member)
                    self._give_up(member)
                    member.num_published = 0
            return []
        kept = group.advance()
        if not kept:
            for member in group.members:
                self._finish(member)
            return [group.output()]
        group.fork(kept, self.block_pool, lambda member: self._arrive(member, now))
        for member in group.members:
            if member.status is Status.WAITING or member.residency is not Residency.DEVICE:
                self._stop_running(member)
                self._pause(member, now)
        return []

    def _stop_running(self, sequence: Sequence) -> None:
        if sequence.status is Status.RUNNING:
            self._running = [item for item in self._running if item.sequence is not sequence]
            sequence.status = Status.WAITING

    # -- tokens --------------------------------------------------------------------------------------------------

    def _draft(self, sequence: Sequence, room: int) -> list[int]:
        """Guesses for a sequence that decodes: at most `room`, within its limits, into blocks that nobody needs."""
        if self._drafter is None or not self._may_draft(sequence):
            return []
        num_tokens = len(sequence.token_ids)
        # The last token may be a forced one, which is no guess's to tell.
        last = 1 if sequence.request.sampling.forced_eos_token_id is None else 2
        room = min(room, max(0, sequence.max_length - num_tokens - last))
        drafts = self._drafter.propose(sequence, room, len(self._running))
        return drafts[: self._reserve(sequence, num_tokens + len(drafts)) - num_tokens] if drafts else []

    def _may_draft(self, sequence: Sequence) -> bool:
        return sequence.is_decoding and sequence.request.sampling.logprobs is None and sequence.group is None

    def _reserve(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks for so many tokens, unless others may need them; returns how many there is room for."""
        missing = self._num_blocks(num_tokens) - len(sequence.block_ids)
        # The others may each need a block in this step.
        if missing > 0 and self.block_pool.num_free >= missing + len(self._pending) + self._max_sequences:
            sequence.block_ids.extend(self.block_pool.allocate(missing) or ())
        return len(sequence.block_ids) * self.block_pool.block_size

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

    def _finish(self, sequence: Sequence) -> None:
        self._stop_running(sequence)
        self._fresh.discard(sequence)
        self._paused.discard(sequence)
        self._away.pop(sequence.request_id, None)
        sequence.status = Status.FINISHED
        if sequence.residency is Residency.DEVICE:
            self.block_pool.free(sequence.block_ids, ends=True)
            sequence.block_ids = []
            sequence.residency = Residency.NONE
        self._policy.on_finish(sequence)
        self._answers.observe_end(sequence)
        if self._drafter is not None:
            self._drafter.forget(sequence.request_id)
        self._freed.append(sequence.request_id)
        del self._sequences[sequence.request_id]
