"""Jumping over steps changes nothing: the same times, counts and block moves as step by step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.bench.simulate import Machine, make_requests, simulate
from fastserve.bench.traces import Trace, TraceRequest
from fastserve.scheduler.cost import Coefficients
from fastserve.scheduler.policy import POLICY_NAMES

STEP = Coefficients(step=0.01, prefill_token=0.001, decode=0.002, decode_context=1e-5)

requests = st.lists(
    st.builds(
        TraceRequest,
        arrival=st.floats(0.0, 3.0),
        num_prompt=st.integers(1, 60),
        num_output=st.integers(1, 60),
        tenant=st.sampled_from(["a", "b"]),
        prefix_hashes=st.sampled_from([(), (1,), (1, 2), (3,)]),
        hash_tokens=st.just(16),
    ),
    min_size=1,
    max_size=16,
)


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("is_known", [True, False])
@settings(max_examples=25, deadline=None)
@given(items=requests, num_blocks=st.sampled_from([0, 10, 24]), places=st.integers(1, 4))
def test_coasting_changes_nothing(
    policy: str, is_known: bool, items: list[TraceRequest], num_blocks: int, places: int
) -> None:
    trace = Trace("random", tuple(sorted(items, key=lambda item: item.arrival)), True)
    machine = Machine(STEP, places, 32, 128, num_blocks, 16, is_known=is_known)
    slow, fast = (simulate(make_requests(trace, 500), machine, policy, coasting=coasting) for coasting in (False, True))
    assert fast.times == slow.times
    counts = ("num_steps", "num_preemptions", "num_pauses", "num_recomputed_tokens", "num_cached_tokens")
    assert [getattr(fast, name) for name in counts] == [getattr(slow, name) for name in counts]
    assert fast.busy_seconds == pytest.approx(slow.busy_seconds)


def test_who_waits_for_memory_may_overtake_while_others_decode() -> None:
    sizes = [(0.0, 12, 22), (0.0, 24, 39), (0.0, 19, 41), (1.0, 4, 51), (1.0, 3, 53), (1.0, 50, 36), (1.33, 13, 19)]
    tenants, hashes = "baabbab", [(3,), (1, 2), (1,), (3,), (3,), (3,), (1, 2)]
    items = [
        TraceRequest(*size, tenant, prefix, 16) for size, tenant, prefix in zip(sizes, tenants, hashes, strict=True)
    ]
    machine = Machine(STEP, 1, 32, 128, 10, 16, is_known=False)
    trace = Trace("found", tuple(items), True)
    slow, fast = (simulate(make_requests(trace, 500), machine, "aged-srpt", coasting=jump) for jump in (False, True))
    assert fast.times == slow.times


def test_coasting_plans_far_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastserve.scheduler.scheduler import Scheduler

    plans = []
    plan = Scheduler.plan
    monkeypatch.setattr(Scheduler, "plan", lambda self, now: plans.append(now) or plan(self, now))
    run = simulate(make_requests(Trace("one", (TraceRequest(0.0, 10, 100),), True)), Machine(STEP), "fcfs")
    assert run.num_steps == 100
    assert len(plans) < 5
