"""The simulator against hand-made cases, and the figures made from a run."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest

from fastserve.bench import policies
from fastserve.bench.bounds import least_mean_ttft
from fastserve.bench.latencies import Limits, RequestTimes, gap_closed, saturated_rate, summarise
from fastserve.bench.simulate import Machine, Run, capacity, make_requests, simulate, warm_cost_model
from fastserve.bench.traces import Trace, TraceRequest
from fastserve.core.errors import ConfigError
from fastserve.scheduler.cost import Coefficients, CostModel, StepWork
from fastserve.scheduler.policy import POLICY_NAMES

STEP = Coefficients(step=0.01, prefill_token=0.001, decode=0.002)
MACHINE = Machine(coefficients=STEP, max_batch_sequences=2, max_batch_tokens=64, context=256)


def test_one_request_takes_exactly_the_time_of_its_steps() -> None:
    trace = Trace("one", (TraceRequest(0.0, 100, 3), TraceRequest(50.0, 10, 1)), True)
    first, second = simulate(make_requests(trace), MACHINE, "fcfs").times
    assert first.ttft == pytest.approx(2 * 0.01 + 100 * 0.001)  # two chunks: 64 and 36 tokens
    assert first.e2e == pytest.approx(first.ttft + 2 * 0.012)
    assert first.tpot == pytest.approx(0.012)
    assert second.arrival == 50.0
    assert second.e2e == pytest.approx(0.02)


def test_shared_prefixes_are_computed_once() -> None:
    requests = tuple(TraceRequest(index * 10.0, 64, 2, prefix_hashes=(7,), hash_tokens=64) for index in range(3))
    run = simulate(make_requests(Trace("same", requests, True)), MACHINE, "fcfs")
    assert run.num_cached_tokens == 2 * 48  # of 64 tokens the last block is computed anew
    assert run.times[1].ttft < run.times[0].ttft


@pytest.mark.parametrize("policy", ["fcfs", "aged-srpt", "skip-join-mlfq"])
def test_a_run_is_complete_deterministic_and_busy(policy: str) -> None:
    draws = random.Random(1)
    items = [TraceRequest(index * 0.05, draws.randrange(1, 200), draws.randrange(1, 50)) for index in range(40)]
    requests = make_requests(Trace("mixed", tuple(items), True))
    runs = [simulate(requests, MACHINE, policy) for _ in range(2)]
    assert [item.num_tokens for item in runs[0].times] == [item.num_output for item in items]
    assert runs[0].times == runs[1].times
    assert all(item.arrival < item.first_token <= item.last_token for item in runs[0].times)


def test_the_least_mean_ttft_is_that_of_the_shortest_remaining_prefill_first() -> None:
    items = (TraceRequest(0.0, 100, 9), TraceRequest(0.02, 30, 9), TraceRequest(0.04, 20, 9), TraceRequest(9.0, 1, 1))
    # 100 ms of work from 0; the second goes first from 20 to 50 ms, then the third, then what is left of the first.
    expected = 0.01 + (0.15 + 0.03 + 0.03 + 0.001) / 4
    assert least_mean_ttft(make_requests(Trace("hand", items, True)), MACHINE) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(4))
def test_no_policy_beats_the_least_mean_ttft(seed: int) -> None:
    draws = random.Random(seed)
    items = [
        TraceRequest(
            index * draws.random() * 0.1,
            draws.randrange(33, 200),
            draws.randrange(1, 20),
            prefix_hashes=(draws.randrange(3),),
            hash_tokens=32,
        )
        for index in range(40)
    ]
    requests = make_requests(Trace("random", tuple(sorted(items, key=lambda item: item.arrival)), True))
    bound = least_mean_ttft(requests, MACHINE)
    found = {name: summarise(simulate(requests, MACHINE, name).times)["mean_ttft"] for name in POLICY_NAMES}
    assert min(found.values()) >= bound > max(found.values()) / 50


def test_capacity_is_the_rate_of_a_full_batch() -> None:
    """Equal requests: capacity is places over the time a request holds its place."""
    trace = Trace("equal", tuple(TraceRequest(0.0, 1, 50) for _ in range(200)), True)
    step = 0.01 + 2 * 0.002
    assert capacity(trace, MACHINE) == pytest.approx(2 / (50 * step), rel=0.03)


def test_the_rate_of_a_full_batch_does_not_depend_on_the_order_of_service() -> None:
    """Ninety small requests before ten of nine times their size, and after them: one at a time, a token a second."""

    def served(sizes: list[int]) -> list[RequestTimes]:
        ends = itertools.accumulate(sizes)
        return [RequestTimes(0.0, end - size + 1, end, size, 0) for size, end in zip(sizes, ends, strict=True)]

    small_first = saturated_rate(served([1] * 90 + [9] * 10), 1)
    large_first = saturated_rate(served([9] * 10 + [1] * 90), 1)
    assert small_first == pytest.approx(100 / 180, rel=0.01)
    assert large_first == pytest.approx(small_first, rel=0.01)


def test_figures_of_a_run() -> None:
    times = [RequestTimes(0.0, 1.0, 1.0, 1, 3), RequestTimes(0.0, 2.0, 6.0, 5, 3)]
    figures = summarise(times, Limits(ttft=1.5, tpot=10))
    assert figures["mean_normalised_latency"] == pytest.approx((1.0 + 6 / 5) / 2)
    assert figures["mean_tpot"] == 1.0  # a single token has none
    assert figures["goodput"] == 0.5
    assert figures["requests_per_s"] == pytest.approx(2 / 6, rel=1e-4)
    assert gap_closed(ours=0.7, fcfs=1.0, oracle=0.5) == pytest.approx(0.6)


def test_policies_report_has_ratios_above_one_for_the_better(tmp_path: Path) -> None:
    rows = ["arrival_s,client_id,input_tokens,output_tokens"]
    rows += [f"{index * 0.1},c{index % 2},16,{200 if index % 5 == 0 else 4}" for index in range(60)]
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(rows))
    report = policies.compare(
        str(path), load=1.1, num_requests=60, policies=["hrrn"], default_policy="srpt-oracle", machine=MACHINE
    )
    metrics = report["metrics"]
    assert metrics["oracle_gap_closed"] == 1.0
    assert metrics["ratio_vs_fcfs.mean_normalised_latency"] > 1.2
    assert metrics["bound.ratio_vs_fcfs.mean_ttft"] > metrics["ratio_vs_fcfs.mean_ttft"]
    assert {"fcfs.goodput", "hrrn.p99_e2e", "srpt-oracle.pauses"} <= set(metrics)
    assert report["config"]["capacity_requests_per_s"] > 0


def test_equal_policies_leave_no_gap_to_report(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,client_id,input_tokens,output_tokens\n" + "".join(f"{i},c,9,4\n" for i in range(9)))
    metrics = policies.compare(str(path), load=0.01, num_requests=9, policies=[], machine=MACHINE)["metrics"]
    assert "oracle_gap_closed" not in metrics and metrics["ratio_vs_fcfs.mean_ttft"] == 1.0


@pytest.mark.parametrize(
    "numbers",
    [
        {"max_batch_sequences": 0},
        {"max_batch_tokens": 1},
        {"num_blocks": 15},
        {"num_blocks": -1},
        {"target_tpot": -0.1},
        {"target_tpot": float("nan")},
    ],
)
def test_numbers_with_which_nothing_could_run_are_refused(numbers: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"at least|a time"):
        replace(MACHINE, **numbers)


def test_cost_model_learns_the_coefficients_and_shrugs_off_a_stall() -> None:
    truth = Coefficients(0.02, 0.0005, 0.003, 1e-7, 1e-6)
    cost = warm_cost_model(Machine(coefficients=truth))
    draws = random.Random(0)
    for step in range(1000):
        work = StepWork(decodes=draws.randrange(17), decode_context=draws.randrange(8000))
        if draws.random() < 0.5:
            work.add(draws.randrange(1000), draws.randrange(2, 256))
        cost.observe(work, truth.seconds(work) * draws.uniform(0.97, 1.03) * (50 if step % 200 == 199 else 1))
    for work in (StepWork(decodes=8, decode_context=3000), StepWork(prefill_tokens=200, prefill_pairs=20_000)):
        assert cost.coefficients.seconds(work) == pytest.approx(truth.seconds(work), rel=0.1)


def test_cost_model_keeps_no_hold_on_what_it_was_told() -> None:
    own, shared = CostModel(), CostModel()
    work = StepWork(decodes=4)
    for step in range(64):
        work.decode_context = 100 * step
        seconds = 0.01 + 1e-6 * work.decode_context
        own.observe(StepWork(decodes=4, decode_context=work.decode_context), seconds)
        shared.observe(work, seconds)
    assert shared.coefficients == own.coefficients


def test_cost_model_without_warm_up_knows_after_sixteen_steps() -> None:
    truth = Coefficients(0.05, 0.002, 0.01)  # ten times slower than what it starts from
    cost = CostModel()
    for step in range(16):
        work = StepWork(decodes=1 + step % 5, prefill_tokens=(step % 3) * 40)
        cost.observe(work, truth.seconds(work))
    for work in (StepWork(decodes=3), StepWork(prefill_tokens=60, decodes=2)):
        assert cost.coefficients.seconds(work) == pytest.approx(truth.seconds(work), rel=0.05)


def test_a_step_is_shared_out_in_full() -> None:
    from fastserve.scheduler.plan import PlanEntry, StepPlan

    cost = CostModel(STEP)
    plan = StepPlan([PlanEntry("a", [1], 50, [0], True), PlanEntry("b", [1] * 30, 0, [1], True)])
    shares = cost.account(plan, 0.5)
    assert sum(shares) == pytest.approx(0.5)
    assert shares[1] / shares[0] == pytest.approx(30 * 0.001 / 0.002)


def test_prompts_are_read_in_pieces_beside_answers() -> None:
    """Pieces of 50 ms while somebody decodes, or what is left if little more; whole chunks when nobody does."""
    items = [TraceRequest(0.0, 120, 60), TraceRequest(0.3, 160, 2), TraceRequest(50.0, 200, 2)]
    machine = Machine(STEP, max_batch_sequences=4, max_batch_tokens=128, context=256)
    run = simulate(make_requests(Trace("mixed", tuple(items), True)), machine, "fcfs", record=True)
    beside = [tokens for _, tokens, decodes in run.steps if tokens and decodes]
    assert sum(beside) == 160 and beside[0] == pytest.approx(50, abs=5) and len(beside) == 3
    assert [tokens for _, tokens, decodes in run.steps if tokens and not decodes] == [120, 128, 72]


def test_a_tpot_target_is_kept_by_smaller_prefills() -> None:
    """Long prompts keep arriving beside running answers: without a target, each token waits for a larger piece."""
    items = [TraceRequest(0.0, 10, 60)] + [TraceRequest(0.2 + index * 0.3, 200, 2) for index in range(8)]
    items.append(TraceRequest(50.0, 200, 2))
    requests = make_requests(Trace("mixed", tuple(items), True))
    machine = Machine(STEP, max_batch_sequences=4, max_batch_tokens=128, context=256)
    free = simulate(requests, machine, "fcfs", record=True)
    bound = simulate(requests, replace(machine, target_tpot=0.05), "fcfs", record=True)
    assert max(_decode_step_seconds(free)) > 0.055
    assert max(_decode_step_seconds(bound)) < 0.05 * 1.1
    assert bound.times[0].tpot < 0.05
    alone = [tokens for _, tokens, decodes in bound.steps if decodes == 0 and tokens > 100]
    assert alone, "with nobody to keep pace for, prompts are read in whole chunks"


def _decode_step_seconds(run: Run) -> list[float]:
    return [STEP.seconds(StepWork(prefill, decodes)) for _, prefill, decodes in run.steps if decodes]
