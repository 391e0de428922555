"""Replay a trace against real engines in this process, and record when their tokens came.

Several engines can run side by side, each on a clock of its own that stands still while another works: so they share
the machine's good and bad moments, which a run after the other would not, and idle times cost nothing.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fastserve.bench.latencies import RequestTimes
from fastserve.core.request import Request
from fastserve.scheduler.cost import CostModel, StepWork

if TYPE_CHECKING:
    from fastserve.engine.engine import Engine

_SLICE = 0.25  # seconds that an engine works before another's turn


class OwnClock:
    """Seconds that pass only between `resume` and `pause`."""

    def __init__(self) -> None:
        self._time = 0.0
        self._resumed: float | None = None

    def __call__(self) -> float:
        return self._time if self._resumed is None else self._time + time.perf_counter() - self._resumed

    def resume(self) -> None:
        assert self._resumed is None
        self._resumed = time.perf_counter()

    def pause(self) -> None:
        self._time, self._resumed = self(), None

    def jump(self, to: float) -> None:
        """Forward to a time, over an idle stretch."""
        assert self._resumed is not None
        self._time, self._resumed = max(to, self()), time.perf_counter()


class RecordingCost(CostModel):
    """Keeps every step that it learns from.

    Attributes:
        steps: (work, seconds) in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[StepWork, float]] = []

    def observe(self, work: StepWork, seconds: float) -> None:
        """See `CostModel`."""
        self.steps.append((work, seconds))
        super().observe(work, seconds)


class Replay:
    """One engine that follows a trace.

    Args:
        engine: made with `clock`, without work.
        clock: paused; its zero is the trace's.
        requests: in order of arrival.

    Attributes:
        times: per request, on `clock`; a request that comes due during a step joins after it, and its wait counts from
            when it was due.
    """

    def __init__(self, engine: Engine, clock: OwnClock, requests: list[Request]) -> None:
        self.clock = clock
        self.times = [
            RequestTimes(item.arrival_time, 0.0, 0.0, 0, len(item.prompt_ids), item.tenant) for item in requests
        ]
        self._engine = engine
        self._requests = requests
        self._by_id = {item.request_id: seen for item, seen in zip(requests, self.times, strict=True)}
        self._upcoming = 0

    @property
    def is_done(self) -> bool:
        return self._upcoming == len(self._requests) and not self._engine.has_work()

    def advance(self, seconds: float) -> None:
        """Work for about so long, or to the end."""
        clock, engine, requests = self.clock, self._engine, self._requests
        clock.resume()
        stop = clock() + seconds
        while not self.is_done and clock() < stop:
            if not engine.has_work():
                clock.jump(requests[self._upcoming].arrival_time)
            while self._upcoming < len(requests) and requests[self._upcoming].arrival_time <= clock():
                engine.add(requests[self._upcoming])
                self._upcoming += 1
            self._step()
        clock.pause()

    def _step(self) -> None:
        outputs = self._engine.step()
        now = self.clock()
        for output in outputs:
            seen = self._by_id[output.request_id]
            if seen.num_tokens == 0:
                seen.first_token = now
            seen.num_tokens += len(output.token_ids)
            seen.last_token = now


def side_by_side(replays: list[Replay], slice_seconds: float = _SLICE) -> None:
    """Run all to the end, always the one that is furthest behind in its trace."""
    while waiting := [item for item in replays if not item.is_done]:
        min(waiting, key=lambda item: item.clock()).advance(slice_seconds)
