"""Scheduler, BlockPool and TierPool under any mix of arrivals, aborts, steps, idle time, resizing and disk errors.

With every policy. After every action: each block is held exactly as often as sequences hold it, no block is written by
two sequences, budgets are kept, and what a step attends to is what was computed for those very tokens, wherever it has
been meanwhile; at the end everything finishes with the tokens it would have made alone, and all memory is free.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastserve.core.request import Request, TokenLogprobs
from fastserve.core.sampling_params import SamplingParams
from fastserve.scheduler.beams import BeamSearch
from fastserve.scheduler.block_pool import BlockPool
from fastserve.scheduler.cost import CostModel, StepWork
from fastserve.scheduler.plan import StepPlan
from fastserve.scheduler.policy import POLICY_NAMES, PolicyContext, make_policy
from fastserve.scheduler.scheduler import Scheduler
from fastserve.scheduler.sequence import Residency, Status
from fastserve.scheduler.tier_pool import REPLACEMENTS, Tier, TierPool
from tests.unit.scheduler.driver import STEP, FakeMemory, execute, next_token

BLOCK = 4
SHARED = [5, 6, 7, 8, 9, 10, 11, 12, 13]


END = 3  # ends the answers of searches
VOCABULARY = 12


def candidates(name: str, output_ids: list[int]) -> TokenLogprobs:
    """What a beam finds: every token, with log probabilities that depend on nothing but the search and the beam."""
    random = Random(f"{name} {output_ids}")
    ranked = sorted(((-4 * random.random(), token_id) for token_id in range(VOCABULARY)), reverse=True)
    return TokenLogprobs([0, *(token_id for _, token_id in ranked)], [0.0, *(value for value, _ in ranked)], 1)


def search_alone(request: Request, longest: int) -> list[list[int]]:
    """The answers of a search without a scheduler."""
    most = min(longest - len(request.prompt_ids), request.sampling.max_tokens or longest)
    search, beams = BeamSearch(request.sampling, frozenset({END}), most), [[]]
    while kept := search.advance([candidates(request.request_id, beam) for beam in beams]):
        beams = [[*beams[parent], token_id] for parent, token_id in kept]
    return [answer.token_ids for answer in search.answers()]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from(POLICY_NAMES),
        num_blocks=st.integers(6, 40),
        places=st.integers(1, 5),
        tokens=st.integers(5, 40),
        prefix_caching=st.booleans(),
        burst=st.sampled_from((0.0, 0.02, 0.2)),
        ends=st.sampled_from((0, 3)),
        tiers=st.lists(st.integers(1, 60), max_size=2),
        replacement=st.sampled_from(REPLACEMENTS),
    )
    def start(
        self,
        policy: str,
        num_blocks: int,
        places: int,
        tokens: int,
        prefix_caching: bool,
        burst: float,
        ends: int,
        tiers: list[int],
        replacement: str,
    ) -> None:
        cost = CostModel(STEP)
        self.longest = min(num_blocks * BLOCK, 60)
        self.places, self.tokens = places, tokens
        self.tiers = TierPool([Tier(slots, 1e-5) for slots in tiers], replacement) if tiers else None
        self.pool = BlockPool(num_blocks, BLOCK, prefix_caching, self.tiers)
        self.memory = FakeMemory(num_blocks, BLOCK)
        self.scheduler = Scheduler(
            self.pool,
            make_policy(policy, PolicyContext(cost, places)),
            max_batch_sequences=places,
            max_batch_tokens=tokens,
            max_model_len=self.longest,
            cost=cost,
            burst_seconds=burst,
        )
        self.ends = ends
        self.now = 0.0
        self.requests: dict[str, Request] = {}
        self.made: dict[str, list[int]] = {}
        self.found: dict[str, list[list[int]]] = {}
        self.aborted: set[str] = set()
        self.in_flight: StepPlan | None = None

    @rule(
        shared=st.integers(0, len(SHARED)),
        own=st.integers(1, 20),
        output=st.integers(1, 30),
        priority=st.integers(0, 2),
        tenant=st.sampled_from("abc"),
        beams=st.sampled_from((1, 1, 1, 2, 3)),
    )
    def arrive(self, shared: int, own: int, output: int, priority: int, tenant: str, beams: int) -> None:
        name = f"r{len(self.requests)}"
        prompt = (SHARED[:shared] + [100 + len(self.requests) + index for index in range(own)])[: self.longest - 1]
        params = SamplingParams(max_tokens=output, ignore_eos=True, seed=0)
        if beams > 1:
            params = replace(params, num_beams=beams, n=beams, stop_token_ids=(END,))
        self.requests[name] = Request(name, prompt, params, self.now, priority, tenant)
        self.scheduler.add(self.requests[name], self.now)

    @rule(which=st.integers(0, 50))
    def abort(self, which: int) -> None:
        live = sorted(self.scheduler._sequences.keys() & self.requests.keys())
        self.scheduler.abort(["unknown", *([live[which % len(live)]] if live else [])])
        if live:
            self.aborted.add(live[which % len(live)])

    @rule(seconds=st.sampled_from([0.001, 0.2, 0.5, 5.0]))
    def idle(self, seconds: float) -> None:
        self.now += seconds

    @rule(num_blocks=st.integers(1, 50))
    def resize(self, num_blocks: int) -> None:
        assert self.scheduler.resize(num_blocks) >= max(num_blocks, self.longest // BLOCK)

    @rule(latency=st.integers(0, 4), fails=st.booleans())
    def trouble(self, latency: int, fails: bool) -> None:
        """The disk becomes slow, or fails in reading and writing, until told otherwise."""
        self.memory.latency, self.memory.fails = latency, fails

    @precondition(lambda self: self.in_flight is None)
    @rule()
    def plan(self) -> None:
        """Plan a step; aborts and arrivals may happen before its result is in."""
        had_work = self.scheduler.has_work()
        plan = self.scheduler.plan(self.now)
        assert bool(plan.entries) == had_work or len(self.memory.coming) > 0 or plan.moves
        assert plan.num_tokens <= self.tokens
        # Rounds are for those who decode when there is nobody else.
        is_alone = len(plan.entries) == len(self.scheduler._sequences) > 0
        assert plan.num_rounds == 1 or is_alone
        assert plan.num_rounds == 1 or all(len(entry.token_ids) == 1 for entry in plan.entries)
        assert len(plan.entries) <= self.places
        assert len({entry.request_id for entry in plan.entries}) == len(plan.entries)
        written: set[int] = set()
        for entry in plan.entries:
            end = entry.start + len(entry.token_ids)
            assert len(entry.block_ids) * BLOCK >= end
            blocks = set(entry.block_ids[entry.start // BLOCK : -(-end // BLOCK)])
            assert not blocks & written
            written |= blocks
        for entry in plan.entries:
            others = (other for other in plan.entries if other is not entry)
            first = entry.start // BLOCK
            fresh = set(entry.block_ids[first:])
            assert all(not fresh & set(other.block_ids) for other in others)
        tokens = {name: sequence.token_ids for name, sequence in self.scheduler._sequences.items()}
        self.loaded = self.memory.run(plan, tokens)
        self.in_flight = plan

    @precondition(lambda self: self.in_flight is not None)
    @rule(steps=st.integers(0, 20))
    def update(self, steps: int) -> None:
        """Take in the result, then run on for some steps and leave the last one in flight."""
        self._update()
        for _ in range(steps):
            self.plan()
            self._update()
        self.plan()

    def _update(self) -> None:
        assert self.in_flight is not None
        plan, self.in_flight = self.in_flight, None
        seconds = STEP.seconds(StepWork.of(plan))
        self.now += seconds
        result = execute(plan, self.ends)
        result.loaded = self.loaded
        for entry in plan.entries:
            sequence = self.scheduler._sequences.get(entry.request_id)
            if entry.samples and sequence is not None and sequence.group is not None:
                found = candidates(sequence.group.request_id, sequence.output_ids)
                result.logprobs[entry.request_id] = found
        for output in self.scheduler.update(plan, result, seconds, self.now):
            assert output.request_id not in self.aborted
            self.made.setdefault(output.request_id, []).extend(output.token_ids)
            if output.beams is not None:
                self.found[output.request_id] = [beam.token_ids for beam in output.beams]

    @invariant()
    def blocks_are_held_as_often_as_sequences_hold_them(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        owners = {id(sequence): sequence for sequence in self.scheduler._sequences.values()}
        owners.update((id(sequence), sequence) for sequence in self.scheduler._loads.sequences())  # aborted ones too
        held = Counter(block for sequence in owners.values() for block in sequence.block_ids)
        held.update(source for source, _ in self.scheduler._copies)  # until they are copied
        assert self.pool._references == [held[block] for block in range(self.pool.num_reachable)]
        assert self.pool.num_used == len(held)
        assert self.pool.num_free == sum(block not in held for block in range(self.pool.num_blocks))

    @invariant()
    def slots_hold_one_block_each(self) -> None:
        if not hasattr(self, "scheduler") or self.tiers is None:
            return
        slots = [entry.slot for entry in self.tiers._entries.values()]
        slots += [slot for level in self.tiers._levels for slot in level.free]
        assert sorted(slots) == list(range(sum(level.tier.num_slots for level in self.tiers._levels)))

    @invariant()
    def states_agree(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        scheduler = self.scheduler
        running = {item.sequence.request_id for item in scheduler._running}
        paused = {item.sequence.request_id for item in scheduler._paused.items()}
        fresh = {item.sequence.request_id for item in scheduler._fresh.items()}
        assert not paused & fresh
        loading = {item.request_id for item in scheduler._loads.sequences() if item.status is not Status.FINISHED}
        assert not loading & (paused | fresh)
        assert set(scheduler._away) <= fresh
        waiting = paused | fresh | loading
        assert not running & waiting
        # Beams that have found their next tokens wait for the others without a place in any queue.
        found = {name for item in scheduler._sequences.values() if item.group for name in item.group.candidates}
        assert not found & (running | waiting)
        assert running | waiting | found == set(scheduler._sequences)
        for name, sequence in scheduler._sequences.items():
            assert (sequence.status is Status.RUNNING) == (name in running)
            assert (sequence.residency is not Residency.NONE) or not sequence.block_ids
            assert (sequence.residency is Residency.LOADING) == (name in loading)
            assert (name in paused) == (name in waiting and sequence.residency is Residency.DEVICE)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        if self.in_flight is not None:
            self._update()
        assert self.tiers is None or self.memory.fails or self.tiers.num_failed <= self.memory.num_errors
        for _ in range(20_000):
            if not self.scheduler.has_work():
                break
            self.plan()
            self._update()
        assert not self.scheduler.has_work(), "livelock"
        for name, request in self.requests.items():
            if request.sampling.num_beams > 1:
                if name not in self.aborted:
                    assert self.found[name] == search_alone(request, self.longest)
                continue
            start = len(request.prompt_ids)
            end = min(start + (request.sampling.max_tokens or 0), self.longest)
            expected = [next_token(name, position) for position in range(start, end)]
            made = self.made.get(name, [])
            assert made == (expected[: len(made)] if name in self.aborted else expected)
        assert self.pool.num_used == 0


SchedulerMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestScheduler = SchedulerMachine.TestCase
