"""What each policy promises: order, bounds on waiting, fairness, and that nothing but the oracle looks at lengths."""

from __future__ import annotations

import random
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastserve.scheduler.cost import CostModel
from fastserve.scheduler.fair import OUTPUT_WEIGHT, VirtualTokenCounter
from fastserve.scheduler.mlfq import SkipJoinMLFQ
from fastserve.scheduler.policy import FCFS, POLICY_NAMES, PolicyContext, Priority, Rank, SchedulingPolicy
from fastserve.scheduler.predictor import NearestLengths, expected_remaining
from fastserve.scheduler.sequence import Sequence
from fastserve.scheduler.shortest import AgedSRPT
from tests.unit.scheduler.driver import STEP, Clocked, request


def mean_finish(driver: Clocked) -> float:
    return sum(driver.finished.values()) / len(driver.finished)


@pytest.mark.parametrize(("stable", "most"), [(float("inf"), 4), (0.0, 60)])
def test_a_rank_is_taken_again_only_when_it_may_have_changed(stable: float, most: int) -> None:
    asked: dict[str, int] = {}

    class Counting(Priority):
        def rank(self, sequence: Sequence, now: float) -> Rank:
            asked[sequence.request_id] = asked.get(sequence.request_id, 0) + 1
            return super().rank(sequence, now)

        def stable_tokens(self, sequence: Sequence) -> float:
            return stable

    driver = Clocked(Counting(PolicyContext()), places=4)
    for index in range(4):
        driver.add(request(str(index), 20, 50))
    driver.run()
    assert len(driver.finished) == 4
    assert most // 2 <= max(asked.values()) <= most


def test_the_oracle_beats_fcfs_when_a_long_request_is_first() -> None:
    means = {}
    for policy in ("fcfs", "srpt-oracle"):
        driver = Clocked(policy, places=1)
        driver.add(request("long", 32, 400))
        for index in range(5):
            driver.add(request(f"short{index}", 32, 5))
        driver.run()
        means[policy] = mean_finish(driver)
    assert means["srpt-oracle"] < means["fcfs"] / 3


def quantum(level: int) -> float:
    """Seconds of service in a level of skip-join MLFQ: the shortest iteration, doubled from level to level."""
    return (STEP.step + STEP.prefill_token) * 2**level


def test_mlfq_joins_the_level_whose_quantum_holds_the_prefill() -> None:
    policy = SkipJoinMLFQ(PolicyContext(CostModel(STEP), 1))
    driver = Clocked(policy, places=1, tokens=4096)
    for num_prompt in (1, 100, 2000):
        driver.add(request(f"p{num_prompt}", num_prompt, 2))
    for num_prompt in (1, 100, 2000):
        sequence = driver.scheduler._sequences[f"p{num_prompt}"]
        level, first = policy.places[sequence.request_id].level, STEP.step + STEP.prefill_token * num_prompt
        assert quantum(level) >= first * (1 - 1e-6)
        assert level == 0 or quantum(level - 1) < first


def test_mlfq_lets_a_short_answer_pass_a_long_one_that_runs() -> None:
    driver = Clocked(SkipJoinMLFQ(PolicyContext(CostModel(STEP), 1), alpha=60.0), places=1)
    driver.add(request("long", 16, 600))
    for _ in range(100):
        driver.step()
    driver.add(request("short", 16, 3, arrival=driver.now))
    arrived = driver.now
    driver.run()
    assert driver.finished["short"] - arrived < 0.1
    assert driver.finished["short"] < driver.finished["long"]
    assert len(driver.made["long"]) == 600


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), alpha=st.sampled_from([0.3, 1.0]))
def test_mlfq_starves_nobody(seed: int, alpha: float) -> None:
    """While no more sequences are promoted at once than there are places, a wait ends alpha + one quantum later."""
    rng = random.Random(seed)
    policy = SkipJoinMLFQ(PolicyContext(CostModel(STEP), 2), alpha=alpha)
    driver = Clocked(policy, places=2)
    for index in range(4):  # two places, four sequences: two can always be promoted and served
        driver.add(request(f"r{index}", rng.randrange(1, 400), rng.randrange(50, 400)))
    waiting_since = dict.fromkeys((f"r{index}" for index in range(4)), 0.0)
    while driver.scheduler.has_work():
        levels = {
            name: policy.places[sequence.request_id].level
            for name in waiting_since
            if (sequence := driver.scheduler._sequences.get(name)) is not None
        }
        plan = driver.step()
        for entry in plan.entries:
            waiting_since[entry.request_id] = driver.now
        longest_step = STEP.step + STEP.prefill_token * 256 + 2 * STEP.decode
        for name, level in levels.items():
            if name in driver.scheduler._sequences:
                bound = alpha + quantum(level) + longest_step  # a step is not cut short
                assert driver.now - waiting_since[name] <= bound + 1e-9


def test_hrrn_prefers_short_prefills_but_ages() -> None:
    driver = Clocked("hrrn", places=1)
    driver.add(request("running", 16, 100))
    driver.step()
    driver.add(request("big", 1000, 2, arrival=driver.now))
    driver.add(request("small", 16, 2, arrival=driver.now))
    driver.run()
    assert driver.finished["small"] < driver.finished["big"]

    driver = Clocked("hrrn", places=1)
    driver.add(request("old", 1000, 2, arrival=-60.0))
    driver.add(request("new", 16, 2, arrival=0.0))
    driver.run()
    assert driver.finished["old"] < driver.finished["new"]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), places=st.integers(1, 4))
def test_fair_keeps_the_gap_between_backlogged_tenants_within_the_bound(seed: int, places: int) -> None:
    rng = random.Random(seed)
    policy = VirtualTokenCounter(PolicyContext(CostModel(STEP), places))
    driver = Clocked(policy, places=places)
    longest_prompt, longest_output = 120, 60
    for index in range(80):
        tenant = "greedy" if index % 4 else "modest"  # one sends three times as much
        prompt, output = rng.randrange(1, longest_prompt + 1), rng.randrange(1, longest_output + 1)
        driver.add(request(f"{tenant}{index}", prompt, output, tenant=tenant))
    bound = 2 * max(longest_prompt, OUTPUT_WEIGHT * places * longest_output)
    while True:
        waiting = {item.sequence.request.tenant for item in driver.scheduler._fresh.items()}
        if len(waiting) < 2:
            break
        gap = abs(policy.counters["greedy"] - policy.counters["modest"])
        assert gap <= bound
        driver.step()
    assert policy.counters["modest"] > bound  # the loop saw enough service to mean something


def test_fair_gives_no_credit_for_absence() -> None:
    policy = VirtualTokenCounter(PolicyContext(CostModel(STEP), 1))
    driver = Clocked(policy, places=1)
    for index in range(20):
        driver.add(request(f"a{index}", 10, 10, tenant="a"))
    for _ in range(100):
        driver.step()
    driver.add(request("late", 10, 10, tenant="b"))
    assert policy.counters["b"] == policy.counters["a"] > 0


def test_aged_srpt_overtakes_within_a_bound_only() -> None:
    """However many small requests keep coming, a large one goes when its delay and their head start have passed."""
    context = PolicyContext(CostModel(STEP), 1)
    driver = Clocked(AgedSRPT(context), places=1)
    driver.policy._predictor.learn("", 800, 300)
    for _ in range(8):
        driver.policy._predictor.learn("", 16, 20)
    for index in range(10):
        driver.add(request(f"first{index}", 16, 20, arrival=driver.now))
    driver.add(request("large", 800, 300, arrival=driver.now))
    limit = driver.now + (1.0 + driver.policy._delay) * driver.policy._aging["large"].backlog
    count = 0
    while "large" not in driver.finished and driver.now < 60:
        if count < 400 and len(driver.scheduler._sequences) < 6:  # a stream that would starve it under SRPT
            driver.add(request(f"s{count}", 16, 20, arrival=driver.now))
            count += 1
        driver.step()
    alone = STEP.step + STEP.prefill_token * 800 + 300 * (STEP.step + STEP.decode)
    assert driver.finished["large"] <= limit + alone + 5 * 20 * (STEP.step + STEP.decode)

    starving = Clocked("srpt-predicted", places=1)
    starving.policy._predictor.learn("", 800, 300)
    for _ in range(8):
        starving.policy._predictor.learn("", 16, 20)
    starving.add(request("large", 800, 300))
    count = 0
    while starving.now < driver.finished["large"] * 2:
        if len(starving.scheduler._sequences) < 6:
            starving.add(request(f"s{count}", 16, 20, arrival=starving.now))
            count += 1
        starving.step()
    assert "large" not in starving.finished


def test_aged_srpt_costs_large_requests_a_share_only() -> None:
    """Above capacity, what goes first is a share of all work: small requests gain, others wait that much longer."""
    sizes, shares = (8, 16, 32, 64, 128, 256), (0.1, 0.1)

    def run(policy: SchedulingPolicy) -> tuple[dict[int, float], float]:
        """Mean stay by size, and the longest."""
        rng, at = random.Random(11), 0.0
        driver = Clocked(policy, places=1)
        size_of, arrivals = {}, []
        for index in range(400):
            size_of[str(index)] = rng.choice(sizes)
            at += rng.expovariate(1.0) * size_seconds / 1.1
            arrivals.append(at)
        for index, at in enumerate(arrivals):
            while driver.now < at and driver.scheduler.has_work():
                driver.step()
            driver.now = max(driver.now, at)
            driver.add(request(str(index), size_of[str(index)], size_of[str(index)], arrival=at))
        driver.run(200_000)
        stays = {name: ended - arrivals[int(name)] for name, ended in driver.finished.items()}
        means = {size: fmean(stay for name, stay in stays.items() if size_of[name] == size) for size in sizes}
        return means, max(stays.values())

    size_seconds = fmean(STEP.step + STEP.prefill_token * size + size * (STEP.step + STEP.decode) for size in sizes)
    context = PolicyContext(CostModel(STEP), 1)
    aged = AgedSRPT(context, small=shares[0], small_prefills=shares[1], delay=0.0)
    for size in sizes:
        for _ in range(8):
            aged._predictor.learn("", size, size)
    in_order, longest_in_order = run(FCFS(context))
    means, longest = run(aged)
    assert means[8] < in_order[8] / 5 and means[16] < in_order[16] / 5
    assert longest < longest_in_order / (1.0 - 1.1 * shares[0])  # prefills are next to nothing here


def test_only_the_oracle_looks_at_max_tokens() -> None:
    """The order of service is the same whatever max_tokens says, as long as answers end at the same length."""
    for policy in POLICY_NAMES:
        orders = []
        for slack in (0, 500):
            driver = Clocked(policy, places=2)
            rng = random.Random(3)
            lengths = {}
            for index in range(12):
                lengths[f"r{index}"] = rng.randrange(3, 60)
                driver.add(request(f"r{index}", rng.randrange(1, 200), lengths[f"r{index}"] + slack))
            order = []
            while driver.scheduler.has_work():
                order.append([entry.request_id for entry in driver.step().entries])
                driver.scheduler.abort(
                    [name for name, tokens in driver.made.items() if slack and len(tokens) == lengths[name]]
                )
            orders.append(order)
        if policy != "srpt-oracle":
            assert orders[0] == orders[1], policy


def test_nearest_lengths_prefers_the_tenant_and_similar_prompts() -> None:
    predictor = NearestLengths(num_neighbours=2, default=77)
    assert predictor.samples("a", 10) == (77,)
    for prompt, output in ((10, 5), (11, 6), (1000, 300), (1010, 310)):
        predictor.learn("a", prompt, output)
        predictor.learn("b", prompt, output * 10)
    assert sorted(predictor.samples("a", 12)) == [5, 6]
    assert sorted(predictor.samples("b", 900)) == [3000, 3100]
    assert sorted(predictor.samples("new", 10)) in ([5, 50], [5, 6], [50, 60])


def test_nearest_lengths_forgets_the_oldest() -> None:
    predictor = NearestLengths(num_neighbours=3, window=3)
    for output in range(10):
        predictor.learn(f"tenant{output}", 100, output)
    assert sorted(predictor.samples("anyone", 100)) == [7, 8, 9]
    assert len(predictor._by_tenant) == 3


@pytest.mark.parametrize(("made", "expected"), [(0, (10 * 1000) ** 0.5), (10, 990.0), (1000, 500.0), (2000, 1000.0)])
def test_expected_remaining_uses_the_lengths_that_are_still_possible(made: int, expected: float) -> None:
    assert expected_remaining((10, 1000), made) == pytest.approx(expected)
