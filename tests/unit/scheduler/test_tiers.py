"""Tiers below the device: what they give up and when reading pays; a pool that shrinks; how long a queue takes."""

from __future__ import annotations

import pytest

from fastserve.scheduler.block_pool import BlockPool
from fastserve.scheduler.cost import CostModel, StepWork
from fastserve.scheduler.mlfq import SkipJoinMLFQ
from fastserve.scheduler.policy import PolicyContext
from fastserve.scheduler.scheduler import Scheduler
from fastserve.scheduler.sequence import Residency
from fastserve.scheduler.tier_pool import Tier, TierPool
from tests.unit.scheduler.driver import STEP, Clocked, FakeMemory, execute, request


def name(index: int) -> bytes:
    return bytes([index])


@pytest.mark.parametrize(("replacement", "gone"), [("lru", 0), ("lfu", 1)])
def test_what_is_given_up(replacement: str, gone: int) -> None:
    tiers = TierPool([Tier(2)], replacement)
    tiers.keep(10, name(0))
    tiers.restore(name(0), 20)
    tiers.keep(11, name(1))
    tiers.keep(12, name(2))
    assert [tiers.count([name(index)]) for index in range(3)] == [int(index != gone) for index in range(3)]


def test_a_full_tier_hands_down_before_it_is_overwritten() -> None:
    tiers = TierPool([Tier(1), Tier(1)])
    for index in range(3):
        tiers.keep(10 + index, name(index))
    assert tiers.take_moves() == [(10, ~0), (~0, ~1), (11, ~0), (~0, ~1), (12, ~0)]
    assert tiers.count([name(1)]) == tiers.count([name(2)]) == 1 and tiers.count([name(0)]) == 0


def serve_twice(seconds_per_block: float, *, prefix_caching: bool = True) -> TierPool:
    """One prompt, then others that need all memory, then the first again."""
    tiers = TierPool([Tier(64, seconds_per_block)])
    cost = CostModel(STEP)
    scheduler = Scheduler(
        BlockPool(8, 16, prefix_caching, tiers),
        SkipJoinMLFQ(PolicyContext(cost, 2)),
        max_batch_sequences=2,
        max_batch_tokens=256,
        max_model_len=128,
        cost=cost,
    )
    memory = FakeMemory(8, 16)
    for label in ("chat", "other", "another", "chat"):
        item = request(label, 100, 4)
        item = type(item)(f"{label}{tiers.num_kept}", item.prompt_ids, item.sampling, 0.0)
        scheduler.add(item, 0.0)
        while scheduler.has_work():
            plan = scheduler.plan(0.0)
            result = execute(plan)
            result.loaded = memory.run(plan, {key: value.token_ids for key, value in scheduler._sequences.items()})
            scheduler.update(plan, result, 0.01, 0.0)
    return tiers


def test_blocks_are_read_when_that_is_quicker_than_computing() -> None:
    assert serve_twice(16 * STEP.prefill_token / 100).num_restored == 6
    assert serve_twice(16 * STEP.prefill_token * 2).num_restored == 0


def test_what_nobody_will_ask_for_again_is_not_kept() -> None:
    assert serve_twice(16 * STEP.prefill_token / 100).num_kept > 0
    assert serve_twice(16 * STEP.prefill_token / 100, prefix_caching=False).num_kept == 0


def test_blocks_above_a_smaller_size_go_when_they_are_given_up() -> None:
    pool = BlockPool(8, 16)
    held = pool.allocate(8)
    assert held is not None
    pool.free(held[:4])
    pool.resize(2)
    assert (pool.num_free, pool.num_used, pool.num_reachable) == (2, 4, 8)
    pool.free(held[6:])
    assert (pool.num_free, pool.num_used, pool.num_reachable) == (2, 2, 6)
    pool.resize(7)
    assert (pool.num_free, pool.num_used, pool.num_reachable) == (5, 2, 7)
    pool.free(held[4:6])
    assert (pool.num_free, pool.num_used) == (7, 0)


def test_with_a_tier_a_short_request_takes_memory_from_long_paused_ones() -> None:
    driver = Clocked("skip-join-mlfq", num_blocks=16, places=2)
    driver.scheduler.block_pool.tiers = TierPool([Tier(64, 1e-6)])
    driver.add(request("long", 100, 140))
    driver.add(request("longer", 110, 130))
    for _ in range(20):
        driver.step()
    driver.add(request("short", 20, 2))
    for _ in range(4):
        driver.step()
    assert "short" in driver.finished
    lost = [item for item in driver.scheduler._sequences.values() if item.residency is Residency.NONE]
    assert len(lost) <= 1


@pytest.mark.parametrize("policy", ["skip-join-mlfq", "aged-srpt", "srpt-oracle"])
def test_with_little_memory_and_a_slow_tier_everyone_gets_somewhere(policy: str) -> None:
    """Turns that are shorter than bringing a sequence back must not end in everyone's going out and coming back."""
    scheduler = Clocked(policy, num_blocks=64, places=8).scheduler
    pool, memory = scheduler.block_pool, FakeMemory(64, 16)
    tiers = pool.tiers = TierPool([Tier(4096, 16 * STEP.prefill_token / 2)])
    for index in range(12):
        scheduler.add(request(str(index), 300 + 20 * index, 20 + 5 * (index * 7 % 12)), 0.0)
    now, num_tokens, num_read = 0.0, 0, 0
    while scheduler.has_work():
        plan = scheduler.plan(now)
        result = execute(plan)
        result.loaded = memory.run(plan, {key: value.token_ids for key, value in scheduler._sequences.items()})
        result.loaded = [(block, is_good, tiers.first.seconds_per_block) for block, is_good, _ in result.loaded]
        seconds = STEP.seconds(StepWork.of(plan))
        now += seconds
        num_read += len(result.loaded)
        num_tokens += sum(len(output.token_ids) for output in scheduler.update(plan, result, seconds, now))
    assert num_tokens == sum(20 + 5 * index for index in range(12))
    assert num_read < num_tokens


def test_the_expected_time_of_a_request_tells_how_long_a_queue_takes() -> None:
    driver = Clocked("fcfs", places=4)
    for index in range(80):
        driver.add(request(f"r{index}", 20 + index % 30, 30 + index % 20))
    assert driver.scheduler.request_seconds == 0.0
    while len(driver.finished) < 20:
        driver.step()
    expected = driver.scheduler.num_waiting * driver.scheduler.request_seconds
    started = driver.now
    while driver.scheduler.num_waiting:
        driver.step()
    assert driver.now - started == pytest.approx(expected, rel=0.25)
