"""Scheduler with a fake clock and a fake runner: order, memory, finishing, and nothing leaked under random traffic."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.core.request import Request
from fastserve.core.sampling_params import SamplingParams
from fastserve.scheduler.block_pool import BlockPool
from fastserve.scheduler.plan import StepPlan, StepResult
from fastserve.scheduler.policy import POLICY_NAMES, make_policy
from fastserve.scheduler.scheduler import Scheduler

EOS = 7


def make_scheduler(num_blocks: int = 64, block_size: int = 4, policy: str = "fcfs", **options: float) -> Scheduler:
    limits = {"max_batch_sequences": 4, "max_batch_tokens": 16, "max_model_len": num_blocks * block_size} | options
    return Scheduler(BlockPool(num_blocks, block_size), make_policy(policy), eos_token_ids=[EOS], **limits)


def make_request(
    name: str, prompt_length: int = 5, arrival: float = 0.0, priority: int = 0, **sampling: int
) -> Request:
    params = replace(SamplingParams(max_tokens=4, seed=0), **sampling)
    prompt = [hash((name, index)) % 1000 + 100 for index in range(prompt_length)]
    return Request(name, prompt, params, arrival, priority)


def next_token(request_id: str, position: int) -> int:
    """A fake model: the next token depends on nothing but the request and the position."""
    return hash((request_id, position)) % 500 + 1000


def execute(plan: StepPlan) -> StepResult:
    tokens = {
        entry.request_id: next_token(entry.request_id, entry.start + len(entry.token_ids))
        for entry in plan.entries
        if entry.samples
    }
    return StepResult(tokens)


def run_to_end(scheduler: Scheduler, max_steps: int = 2000) -> dict[str, list[int]]:
    made: dict[str, list[int]] = {}
    for step in range(max_steps):
        if not scheduler.has_work():
            return made
        plan = scheduler.plan(float(step))
        for output in scheduler.update(plan, execute(plan), 0.01, float(step)):
            made.setdefault(output.request_id, []).extend(output.token_ids)
    raise AssertionError("did not finish")


def test_decodes_go_on_while_a_long_prompt_is_prefilled_in_chunks() -> None:
    scheduler = make_scheduler(max_batch_tokens=8)
    scheduler.add(make_request("a", 3), 0.0)
    plan = scheduler.plan(0.0)
    scheduler.update(plan, execute(plan), 0.01, 0.0)
    scheduler.add(make_request("long", 20, arrival=1.0), 1.0)
    plan = scheduler.plan(1.0)
    sizes = {entry.request_id: (len(entry.token_ids), entry.samples) for entry in plan.entries}
    assert sizes == {"a": (1, True), "long": (7, False)}


def test_plan_never_exceeds_the_token_or_sequence_limit() -> None:
    scheduler = make_scheduler(max_batch_tokens=10, max_batch_sequences=3)
    for index in range(8):
        scheduler.add(make_request(f"r{index}", 6, arrival=index), float(index))
    while scheduler.has_work():
        plan = scheduler.plan(9.0)
        assert plan.num_tokens <= 10
        assert len(plan.entries) <= 3
        scheduler.update(plan, execute(plan), 0.01, 9.0)


def test_a_repeated_prompt_is_taken_from_the_prefix_cache() -> None:
    scheduler = make_scheduler()
    first = make_request("a", 11)
    scheduler.add(first, 0.0)
    run_to_end(scheduler)
    scheduler.add(Request("b", first.prompt_ids, first.sampling, 1.0), 1.0)
    plan = scheduler.plan(1.0)
    assert plan.entries[0].start == 8  # two full blocks of four
    assert len(plan.entries[0].token_ids) == 3


def test_the_last_prompt_token_is_always_computed() -> None:
    scheduler = make_scheduler()
    first = make_request("a", 8)
    scheduler.add(first, 0.0)
    run_to_end(scheduler)
    scheduler.add(Request("b", first.prompt_ids, first.sampling, 1.0), 1.0)
    assert scheduler.plan(1.0).entries[0].start == 4


def test_memory_pressure_preempts_the_latest_and_everything_finishes() -> None:
    scheduler = make_scheduler(num_blocks=8, max_batch_tokens=32, max_model_len=32)
    for index in range(4):
        scheduler.add(make_request(f"r{index}", 6, arrival=index, max_tokens=16), float(index))
    made = run_to_end(scheduler)
    assert scheduler.num_preemptions > 0
    for index in range(4):
        assert made[f"r{index}"] == [next_token(f"r{index}", position) for position in range(6, 22)]
    assert scheduler.block_pool.num_used == 0


def test_end_token_stop_ids_ignore_eos_and_length() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a"), 0.0)
    plan = scheduler.plan(0.0)
    (output,) = scheduler.update(plan, StepResult({"a": EOS}), 0.01, 0.0)
    assert (output.finish_reason, output.stop_token_id) == ("stop", EOS)
    scheduler.add(make_request("b", ignore_eos=True, stop_token_ids=(9,)), 0.0)
    plan = scheduler.plan(0.0)
    (output,) = scheduler.update(plan, StepResult({"b": EOS}), 0.01, 0.0)
    assert output.finish_reason is None
    plan = scheduler.plan(0.0)
    (output,) = scheduler.update(plan, StepResult({"b": 9}), 0.01, 0.0)
    assert (output.finish_reason, output.stop_token_id) == ("stop", 9)


def test_a_form_that_cannot_go_on_is_the_requests_error() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a"), 0.0)
    plan = scheduler.plan(0.0)
    (output,) = scheduler.update(plan, StepResult({"a": 5}, errors={"a": "too large"}), 0.01, 0.0)
    assert (output.finish_reason, output.error, output.is_refused) == ("error", "too large", True)
    assert not scheduler.has_work()


def test_max_model_len_ends_a_sequence() -> None:
    scheduler = make_scheduler(num_blocks=2, block_size=4)
    scheduler.add(make_request("a", 6, max_tokens=100), 0.0)
    assert len(run_to_end(scheduler)["a"]) == 2


def test_priority_pauses_the_least_urgent_and_keeps_its_memory() -> None:
    scheduler = make_scheduler(policy="priority", max_batch_sequences=2)
    for name in ("a", "b"):
        scheduler.add(make_request(name, priority=5, max_tokens=8), 0.0)
    plan = scheduler.plan(0.0)
    scheduler.update(plan, execute(plan), 0.01, 0.0)
    scheduler.add(make_request("urgent", arrival=1.0, priority=0, max_tokens=2), 1.0)
    plan = scheduler.plan(1.0)
    assert {entry.request_id for entry in plan.entries} == {"a", "urgent"}
    assert scheduler.num_preemptions == 0
    scheduler.update(plan, execute(plan), 0.01, 1.0)
    made = run_to_end(scheduler)
    assert made["b"] == [next_token("b", position) for position in range(6, 13)]


def test_abort_frees_memory_in_every_state() -> None:
    scheduler = make_scheduler(max_batch_sequences=1)
    scheduler.add(make_request("running"), 0.0)
    scheduler.add(make_request("waiting"), 0.0)
    plan = scheduler.plan(0.0)
    scheduler.abort(["running", "waiting", "unknown"])
    assert scheduler.update(plan, execute(plan), 0.01, 0.0) == []
    assert not scheduler.has_work()
    assert scheduler.block_pool.num_used == 0
    assert scheduler.plan(0.0).freed == ["running", "waiting"]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(6, 24),
    policy=st.sampled_from(POLICY_NAMES),
    max_tokens=st.integers(4, 24),
)
def test_random_traffic_loses_and_leaks_nothing(seed: int, num_blocks: int, policy: str, max_tokens: int) -> None:
    rng = random.Random(seed)
    longest = min(num_blocks * 4, 40)
    scheduler = make_scheduler(num_blocks, 4, policy, max_batch_tokens=max_tokens, max_model_len=longest)
    made: dict[str, list[int]] = {}
    expected: dict[str, list[int]] = {}
    aborted: set[str] = set()
    shared = [rng.randrange(1000) for _ in range(8)]
    for step in range(3000):
        now = float(step)
        if step < 60 and rng.random() < 0.5:
            name = f"r{step}"
            prompt = shared[: rng.randrange(8)] + [rng.randrange(1000) for _ in range(rng.randrange(1, 12))]
            length = rng.randrange(1, 12)
            params = SamplingParams(max_tokens=length, seed=0)
            scheduler.add(Request(name, prompt, params, now, rng.randrange(3)), now)
            expected[name] = [
                next_token(name, len(prompt) + index) for index in range(min(length, longest - len(prompt)))
            ]
        if expected and rng.random() < 0.05:
            name = rng.choice(sorted(expected))
            scheduler.abort([name])
            aborted.add(name)
        plan = scheduler.plan(now)
        held = [set(entry.block_ids) for entry in plan.entries]
        for entry in plan.entries:
            assert len(entry.block_ids) * 4 >= entry.start + len(entry.token_ids)
            fresh = set(entry.block_ids[entry.start // 4 :])  # blocks being written must be this sequence's alone
            assert all(not fresh & other for other in held if other is not held[plan.entries.index(entry)])
        for output in scheduler.update(plan, execute(plan), 0.01, now):
            made.setdefault(output.request_id, []).extend(output.token_ids)
        if step >= 60 and not scheduler.has_work():
            break
    assert not scheduler.has_work()
    for name, tokens in expected.items():
        if name in aborted:
            assert made.get(name, []) == tokens[: len(made.get(name, []))]
        else:
            assert made[name] == tokens
    assert scheduler.block_pool.num_used == 0
    assert scheduler.num_running == scheduler.num_waiting == 0


def test_a_plan_of_several_rounds_ends_before_somebody_has_to_decide() -> None:
    scheduler = make_scheduler(num_blocks=16, block_size=8, burst_seconds=10.0)
    scheduler.add(make_request("a", 6, max_tokens=14), 0.0)

    def step(*made: int) -> StepPlan:
        plan = scheduler.plan(0.0)
        further = {"a": list(made[1:])} if len(made) > 1 else {}
        scheduler.update(plan, StepResult({"a": made[0]}, further=further, num_rounds=len(made)), 0.01, 0.0)
        return plan

    assert step(100).num_rounds == 1  # a prompt
    assert step(101, 102).num_rounds == 2  # positions 6 and 7 end the block
    plan = step(103, 104, 105)  # the runner may stop earlier
    assert (plan.num_rounds, plan.entries[0].start, plan.entries[0].token_ids) == (8, 8, [102])
    plan = step(106, 107, 108, 109, 110)
    assert (plan.num_rounds, plan.entries[0].start, plan.entries[0].token_ids) == (5, 11, [105])
    assert step(111).num_rounds == 3  # three are left until max_tokens
    scheduler.add(make_request("b", 6, max_tokens=9, logprobs=1), 0.0)
    plan = scheduler.plan(0.0)
    assert len(plan.entries) == 2 and plan.num_rounds == 1  # somebody has a prompt
    scheduler.update(plan, StepResult({"a": 112, "b": 5}), 0.01, 0.0)
    assert scheduler.plan(0.0).num_rounds == 1  # somebody wants log probabilities
    quick = make_scheduler(num_blocks=16, block_size=8, burst_seconds=0.02)  # a step is guessed at 6 ms
    quick.add(make_request("a", 8, max_tokens=14), 0.0)
    quick.update(quick.plan(0.0), StepResult({"a": 100}), 0.006, 0.0)
    assert quick.plan(0.0).num_rounds == 3


def test_unknown_policy_is_refused_with_the_names() -> None:
    with pytest.raises(ValueError, match="fcfs"):
        make_policy("lifo")
    with pytest.raises(ValueError, match="cannot be loaded"):
        make_policy("fastserve.nowhere:Policy")
