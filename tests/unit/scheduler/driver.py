"""A scheduler with a fake model: the next token depends on nothing but the request and the position."""

from __future__ import annotations

from fastserve.core.request import Request
from fastserve.core.sampling_params import SamplingParams
from fastserve.scheduler.block_pool import BlockPool
from fastserve.scheduler.cost import Coefficients, CostModel, StepWork
from fastserve.scheduler.plan import PlanEntry, StepPlan, StepResult
from fastserve.scheduler.policy import PolicyContext, SchedulingPolicy, make_policy
from fastserve.scheduler.scheduler import Scheduler

STEP = Coefficients(step=0.006, prefill_token=0.00025, decode=0.0009)


def next_token(request_id: str, position: int) -> int:
    return sum(request_id.encode()) * 31 % 400 + position


def execute(plan: StepPlan, ends: int = 0) -> StepResult:
    """What a plan makes; rounds stop early after a token that is a multiple of `ends`."""
    made: dict[str, list[int]] = {entry.request_id: [] for entry in plan.entries if entry.samples}
    for num_rounds in range(1, plan.num_rounds + 1):
        for entry in plan.entries:
            if entry.samples:
                position = entry.start + len(entry.token_ids) + num_rounds - 1
                made[entry.request_id].append(next_token(entry.request_id, position))
        if ends and any(tokens[-1] % ends == 0 for tokens in made.values()):
            break
    further = {name: tokens[1:] for name, tokens in made.items() if len(tokens) > 1}
    first = {name: tokens[0] for name, tokens in made.items()}
    return StepResult(first, further=further, num_rounds=num_rounds)


class FakeMemory:
    """Device blocks and tier slots that remember what was computed into them: for each token, all tokens up to it.

    Reads from slots arrive `latency` steps later, or at once when there is nothing else to do. While `fails` is set,
    nothing is written to a slot and nothing can be read from one.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.latency, self.fails = 0, False
        self.num_errors = 0
        self.coming: list[tuple[int, int, list[int] | None]] = []  # (arrives in step, block, content)
        self._step = 0
        self._device: dict[int, list[int]] = {}
        self._slots: dict[int, list[int] | None] = {}

    def run(self, plan: StepPlan, tokens: dict[str, list[int]]) -> list[tuple[int, bool, float]]:
        """Carry out a plan; `tokens` are all sequences' token ids. Returns StepResult.loaded."""
        self._step += 1
        for source, target in plan.moves:
            content = self._device[source][:] if source >= 0 else self._slots[~source]
            if self.fails:
                content = None
                self.num_errors += 1
            if target >= 0:
                self.coming.append((self._step + self.latency, target, content))
            else:
                self._slots[~target] = content
        if plan.num_blocks:
            self.num_blocks = plan.num_blocks
            self._device = {block: content for block, content in self._device.items() if block < self.num_blocks}
        copied = [(target, self._device[source][:]) for source, target in plan.copies]
        self._device.update(copied)
        for entry in plan.entries:
            assert max(entry.block_ids) < self.num_blocks
            self._compute(entry, tokens[entry.request_id], plan.num_rounds)
        must_wait = not plan.entries
        arrived = [item for item in self.coming if item[0] <= self._step] or (self.coming[:1] if must_wait else [])
        self.coming = [item for item in self.coming if item not in arrived]
        for _, block, content in arrived:
            self._device[block] = list(content or [])
        return [(block, content is not None, 1e-5) for _, block, content in arrived]

    def _compute(self, entry: PlanEntry, token_ids: list[int], num_rounds: int) -> None:
        size, end = self.block_size, entry.start + len(entry.token_ids) + num_rounds - 1
        assert num_rounds == 1 or end <= (entry.start // size + 1) * size, "rounds go on in another block"
        token_ids = token_ids + [next_token(entry.request_id, place) for place in range(len(token_ids), end)]
        for position in range(end):
            block, offset = self._device.setdefault(entry.block_ids[position // size], []), position % size
            identity = hash(tuple(token_ids[: position + 1]))
            if position < entry.start:
                assert block[offset] == identity, f"position {position} holds something else"
            else:
                del block[offset:]
                assert len(block) == offset
                block.append(identity)


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
