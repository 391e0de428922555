"""Shortest first: by the whole wait (HRRN), by what remains (SRPT), and with bounded overtaking (AgedSRPT).

Work is in seconds of the cost model: prefill of what the prefix cache lacks, and decoding as a share of full steps.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from dataclasses import dataclass

from fastserve.scheduler.policy import FCFS, PolicyContext, Rank
from fastserve.scheduler.predictor import NearestLengths, expected_remaining
from fastserve.scheduler.sequence import Sequence


class HRRN(FCFS):
    """Highest response ratio next: (wait + service) / service, service being the uncached prefill. Does not preempt.

    Ratios of all who wait change all the time, but among requests of about equal service (lanes, 10 % wide) the first
    to come has the highest: so only the heads of the lanes are compared.
    """

    uses_cost = True

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        self._service: dict[str, float] = {}

    def on_arrival(self, sequence: Sequence, now: float) -> None:
        self._service[sequence.request_id] = self._context.cost.first_iteration_seconds(sequence.num_uncached)

    def lane(self, sequence: Sequence) -> str:
        return str(round(math.log(self._service[sequence.request_id]) / math.log(1.1)))

    def lane_rank(self, lane: str, first: Sequence, now: float) -> float:
        return -1.0 - (now - first.request.arrival_time) / self._service[first.request_id]

    def on_finish(self, sequence: Sequence) -> None:
        del self._service[sequence.request_id]


class SRPTOracle(FCFS):
    """Shortest remaining time first, knowing that every request runs to its `max_tokens`. For benchmarks only."""

    preemptive = True
    uses_cost = True

    def rank(self, sequence: Sequence, now: float) -> Rank:
        tokens_left = (sequence.request.sampling.max_tokens or 1) - len(sequence.token_ids) + sequence.num_prompt
        return (self._prefill(sequence) + self._decode(tokens_left, sequence),)

    def _prefill(self, sequence: Sequence) -> float:
        if len(sequence.token_ids) - sequence.num_computed == 1 and len(sequence.token_ids) > sequence.num_prompt:
            return 0.0
        num_tokens = sequence.num_uncached
        return self._context.cost.prefill_seconds(num_tokens, len(sequence.token_ids) - num_tokens)

    def _decode(self, num_tokens: float, sequence: Sequence) -> float:
        context = len(sequence.token_ids)
        return self._context.cost.decode_seconds(num_tokens, context, self._context.max_batch_sequences)


@dataclass(slots=True)
class _Forecast:
    """What is thought of one sequence: taken again after a few tokens, not after each."""

    samples: tuple[int, ...]
    retake_at: int = 0  # output length
    rank: Rank = ()


class SRPTPredicted(SRPTOracle):
    """Shortest remaining time first with predicted lengths, given what was made already. Nothing bounds a wait."""

    uses_cost = False  # lengths come from requests that finished; by then the cost model has learnt from their steps

    def __init__(self, context: PolicyContext, predictor: NearestLengths | None = None) -> None:
        super().__init__(context)
        self._predictor = predictor or NearestLengths()
        self._forecasts: dict[str, _Forecast] = {}

    def on_arrival(self, sequence: Sequence, now: float) -> None:
        samples = self._predictor.samples(sequence.request.tenant, sequence.num_prompt)
        self._forecasts[sequence.request_id] = _Forecast(samples)

    def rank(self, sequence: Sequence, now: float) -> Rank:
        forecast = self._forecasts[sequence.request_id]
        num_tokens = len(sequence.token_ids)
        num_output = num_tokens - sequence.num_prompt
        if num_output >= forecast.retake_at or num_tokens - sequence.num_computed > 1:
            tokens_left = expected_remaining(forecast.samples, num_output)
            forecast.retake_at = num_output + min(1 + num_output, 8 + num_output // 8)
            forecast.rank = self._take_rank(sequence, tokens_left)
        return forecast.rank

    def stable_tokens(self, sequence: Sequence) -> float:
        return self._forecasts[sequence.request_id].retake_at - sequence.num_output

    def _take_rank(self, sequence: Sequence, tokens_left: float) -> Rank:
        return (self._prefill(sequence) + self._decode(tokens_left, sequence),)

    def on_finish(self, sequence: Sequence) -> None:
        del self._forecasts[sequence.request_id]
        if sequence.num_output > 0:
            self._predictor.learn(sequence.request.tenant, sequence.num_prompt, sequence.num_output)


class _Recent:
    """Quantile of the last values."""

    def __init__(self, share: float, window: int = 512) -> None:
        self._share = share
        self._order: deque[float] = deque()
        self._sorted: list[float] = []
        self._window = window

    def add(self, value: float) -> float:
        """Take in a value; returns the quantile."""
        self._order.append(value)
        bisect.insort(self._sorted, value)
        if len(self._order) > self._window:
            del self._sorted[bisect.bisect_left(self._sorted, self._order.popleft())]
        return self._sorted[int(self._share * (len(self._sorted) - 1))]


@dataclass(slots=True)
class _Aging:
    """One sequence: seconds of work that are left as predicted at arrival, and what its rank is made of."""

    prefill_left: float
    decode_left: float
    delay: float  # at most so many seconds' arrivals may overtake it
    head_start: float  # and so many seconds' earlier arrivals it may overtake until its first token
    unit_work: float
    unit_tokens: float


class AgedSRPT(SRPTPredicted):
    """Shortest predicted remaining time first, but nobody is overtaken by those who came much later.

    The rank is a time: arrival, plus a delay that grows with the expected work, less a head start until the first
    token is out. Both are in proportion to the backlog met on arrival, so that an idle server is first come, first
    served, and a sequence is overtaken only by arrivals of the next `delay + head_start` seconds. The delay of a small
    request is near zero, that of the larger ones (the upper 15 %) is whole: among themselves they keep their order.
    Measured choice of the factors: docs/decisions/0020-scheduling-policies.md.

    Args:
        delay: delay of large requests, in backlogs.
        head_start: in backlogs of decoding; prefills cannot help a first token by going before other prefills.
        large: quantile of recent requests from which on one counts as large.
        length_weight: 0 ranks by remaining work alone (SRPT); 1 by the whole answer's length alone.
    """

    def __init__(
        self,
        context: PolicyContext,
        predictor: NearestLengths | None = None,
        delay: float = 1.5,
        head_start: float = 0.8,
        large: float = 0.85,
        length_weight: float = 0.25,
    ) -> None:
        super().__init__(context, predictor)
        self._delay = delay
        self._head_start = head_start
        self._length_weight = length_weight
        self._large_work = _Recent(large)
        self._large_tokens = _Recent(large)
        self._prefill_backlog = 0.0
        self._decode_backlog = 0.0
        self._aging: dict[str, _Aging] = {}

    def on_arrival(self, sequence: Sequence, now: float) -> None:
        super().on_arrival(sequence, now)
        tokens = expected_remaining(self._forecasts[sequence.request_id].samples, 0)
        prefill, decode = self._prefill(sequence), self._decode(tokens, sequence)
        self._prefill_backlog += prefill
        self._decode_backlog += decode
        self._aging[sequence.request_id] = _Aging(
            prefill,
            decode,
            delay=self._delay * (self._prefill_backlog + self._decode_backlog),
            head_start=self._head_start * self._decode_backlog,
            unit_work=self._large_work.add(prefill + decode),
            unit_tokens=self._large_tokens.add(tokens),
        )

    def _take_rank(self, sequence: Sequence, tokens_left: float) -> Rank:
        aging = self._aging[sequence.request_id]
        work = (self._prefill(sequence) + self._decode(tokens_left, sequence)) / aging.unit_work
        length = (sequence.num_output + tokens_left) / aging.unit_tokens
        size = work ** (1.0 - self._length_weight) * length**self._length_weight
        due = sequence.request.arrival_time + aging.delay * min(1.0, size)
        return (due - aging.head_start if sequence.num_output == 0 else due,)

    def on_service(self, sequence: Sequence, num_tokens: int, seconds: float, now: float) -> None:
        aging = self._aging[sequence.request_id]
        if sequence.first_token_time is None:
            done = seconds if seconds < aging.prefill_left else aging.prefill_left
            aging.prefill_left -= done
            self._prefill_backlog -= done
        elif aging.decode_left > 0.0:
            done = seconds if seconds < aging.decode_left else aging.decode_left
            aging.decode_left -= done
            self._decode_backlog -= done

    def on_finish(self, sequence: Sequence) -> None:
        super().on_finish(sequence)
        aging = self._aging.pop(sequence.request_id)
        self._prefill_backlog = max(0.0, self._prefill_backlog - aging.prefill_left)
        self._decode_backlog = max(0.0, self._decode_backlog - aging.decode_left)
        if not self._aging:
            self._prefill_backlog = self._decode_backlog = 0.0  # rounding must not add up over days
