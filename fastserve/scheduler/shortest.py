"""Shortest first: by the whole wait (HRRN), by what remains (SRPT), and with bounded overtaking (AgedSRPT).

Work is in seconds of the cost model: prefill of what the prefix cache lacks, and decoding as a share of full steps.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from dataclasses import dataclass
from itertools import accumulate

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
        return self._take_rank(sequence, tokens_left)

    def _take_rank(self, sequence: Sequence, tokens_left: float) -> Rank:
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

    def on_finish(self, sequence: Sequence) -> None:
        del self._forecasts[sequence.request_id]
        if sequence.num_output > 0:
            self._predictor.learn(sequence.request.tenant, sequence.num_prompt, sequence.num_output)


class _Recent:
    """The last requests: their sizes in order, and how much work each is."""

    def __init__(self, window: int = 512) -> None:
        self._order: deque[tuple[float, float]] = deque()
        self._sorted: list[tuple[float, float]] = []
        self._window = window

    def add(self, size: float, work: float) -> None:
        self._order.append((size, work))
        bisect.insort(self._sorted, (size, work))
        if len(self._order) > self._window:
            del self._sorted[bisect.bisect_left(self._sorted, self._order.popleft())]

    def work(self) -> float:
        return math.fsum(work for _, work in self._order)

    def quantile(self, share: float) -> float:
        return self._sorted[int(share * (len(self._sorted) - 1))][0]

    def largest_within(self, work: float) -> float:
        """The size up to which all requests together are no more than `work`; 0 where the smallest is more."""
        within = bisect.bisect_right(list(accumulate(each for _, each in self._sorted)), work)
        return self._sorted[within - 1][0] if within else 0.0


def _size(work: float, tokens: float) -> float:
    """The fourth power of what decides: work (seconds) and, for a quarter, the length of the answer."""
    return work * work * work * tokens


@dataclass(slots=True)
class _Aging:
    """One sequence, in seconds of work as predicted at its arrival."""

    prefill: float
    left: float
    backlog: float  # of all who were there, itself included


class AgedSRPT(SRPTPredicted):
    """Shortest predicted remaining time first, but others wait little for it.

    The rank is a time. What goes first is chosen so that it is a small part of all work, and costs the others no more
    than that: small requests, and until their first token those with small prefills, rank a backlog before their
    arrival. The others rank a delay after it, which grows with what remains of them; the larger ones (the upper 15 %)
    keep their order. The backlog is the one met on arrival: an idle server is first come, first served, and a sequence
    is overtaken only by arrivals of the next `delay` backlogs, and, for one more of theirs, by what goes first.
    Measured choice of the factors: docs/decisions/0020-scheduling-policies.md.

    Args:
        small: share of all work that small requests are.
        small_prefills: share of all work that the prefills done early are.
        delay: of large requests, in backlogs.
    """

    def __init__(
        self,
        context: PolicyContext,
        predictor: NearestLengths | None = None,
        small: float = 0.12,
        small_prefills: float = 0.05,
        delay: float = 0.6,
    ) -> None:
        super().__init__(context, predictor)
        self._small, self._small_prefills = small, small_prefills
        self._delay = delay
        self._sizes, self._prefills = _Recent(), _Recent()
        self._small_size = self._small_prefill = 0.0  # the largest that go first
        self._backlog = 0.0
        self._aging: dict[str, _Aging] = {}

    def on_arrival(self, sequence: Sequence, now: float) -> None:
        super().on_arrival(sequence, now)
        tokens = expected_remaining(self._forecasts[sequence.request_id].samples, 0)
        prefill = self._prefill(sequence)
        work = prefill + self._decode(tokens, sequence)
        self._backlog += work
        self._aging[sequence.request_id] = _Aging(prefill, work, self._backlog)
        self._sizes.add(_size(work, tokens), work)
        self._prefills.add(prefill, prefill)
        all_work = self._sizes.work()
        self._small_size = self._sizes.largest_within(self._small * all_work)
        self._small_prefill = self._prefills.largest_within(self._small_prefills * all_work)

    def _take_rank(self, sequence: Sequence, tokens_left: float) -> Rank:
        aging, arrival = self._aging[sequence.request_id], sequence.request.arrival_time
        tokens = sequence.num_output + tokens_left
        whole = _size(aging.prefill + self._decode(tokens, sequence), tokens)
        if whole <= self._small_size or (sequence.num_output == 0 and aging.prefill <= self._small_prefill):
            return (arrival - aging.backlog,)
        (left,) = super()._take_rank(sequence, tokens_left)
        size = min(1.0, _size(left, tokens) / self._sizes.quantile(0.85)) ** 0.25
        return (arrival + self._delay * aging.backlog * size,)

    def on_service(self, sequence: Sequence, num_tokens: int, seconds: float, now: float) -> None:
        aging = self._aging[sequence.request_id]
        done = seconds if seconds < aging.left else aging.left
        aging.left -= done
        self._backlog -= done

    def on_finish(self, sequence: Sequence) -> None:
        super().on_finish(sequence)
        self._backlog = max(0.0, self._backlog - self._aging.pop(sequence.request_id).left)
        if not self._aging:
            self._backlog = 0.0  # rounding must not add up over days
