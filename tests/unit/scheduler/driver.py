"""A scheduler with a fake model: the next token depends on nothing but the request and the position."""

from __future__ import annotations

from fastserve.core.request import Request
from fastserve.core.sampling_params import SamplingParams
from fastserve.scheduler.block_pool import BlockPool
from fastserve.scheduler.cost import Coefficients, CostModel, StepWork
from fastserve.scheduler.plan import StepPlan
from fastserve.scheduler.policy import PolicyContext, SchedulingPolicy, make_policy
from fastserve.scheduler.scheduler import Scheduler, StepResult

STEP = Coefficients(step=0.006, prefill_token=0.00025, decode=0.0009)


def next_token(request_id: str, position: int) -> int:
    return sum(request_id.encode()) * 31 % 400 + position


def execute(plan: StepPlan) -> StepResult:
    return StepResult(
        {
            entry.request_id: next_token(entry.request_id, entry.start + len(entry.token_ids))
            for entry in plan.entries
            if entry.samples
        }
    )


def request(
    name: str, num_prompt: int, num_output: int, arrival: float = 0.0, tenant: str = "", priority: int = 0
) -> Request:
    """A request with a prompt of its own that makes exactly `num_output` tokens."""
    salt = sum(ord(letter) * 7**place for place, letter in enumerate(name))
    prompt = [(salt * 131 + index * 17) % 1000 for index in range(num_prompt)]
    params = SamplingParams(max_tokens=num_output, ignore_eos=True, seed=0)
    return Request(name, prompt, params, arrival, priority, tenant)


class Clocked:
    """Drives a Scheduler on a virtual clock with the step times of `STEP`."""

    def __init__(
        self, policy: str | SchedulingPolicy, num_blocks: int = 4096, places: int = 2, tokens: int = 256
    ) -> None:
        cost = CostModel(STEP)
        made = make_policy(policy, PolicyContext(cost, places)) if isinstance(policy, str) else policy
        self.policy = made
        self.scheduler = Scheduler(
            BlockPool(num_blocks, 16),
            made,
            max_batch_sequences=places,
            max_batch_tokens=tokens,
            max_model_len=min(4096, num_blocks * 16),
            cost=cost,
        )
        self.now = 0.0
        self.finished: dict[str, float] = {}
        self.made: dict[str, list[int]] = {}
        self.num_served: dict[str, int] = {}

    def add(self, item: Request) -> None:
        self.scheduler.add(item, self.now)

    def step(self) -> StepPlan:
        plan = self.scheduler.plan(self.now)
        seconds = STEP.seconds(StepWork.of(plan))
        self.now += seconds
        for output in self.scheduler.update(plan, execute(plan), seconds, self.now):
            self.made.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.finished[output.request_id] = self.now
        return plan

    def run(self, max_steps: int = 20_000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work():
                return
            self.step()
        raise AssertionError("did not finish")
