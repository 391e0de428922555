"""A trace against the real engine: every token is recorded, arrivals are kept to, engines in turn do not disturb."""

from __future__ import annotations

import time
from pathlib import Path

from fastserve.bench.replay import OwnClock, RecordingCost, Replay, side_by_side
from fastserve.bench.simulate import make_requests
from fastserve.bench.traces import Trace, TraceRequest
from fastserve.core.config import EngineConfig
from fastserve.engine.engine import Engine
from tests import folders


def test_replays_side_by_side_keep_arrivals_and_count_every_token(tmp_path: Path) -> None:
    model = str(folders.llama(tmp_path / "llama"))
    trace = Trace("t", (TraceRequest(0.0, 20, 5), TraceRequest(0.0, 5, 1), TraceRequest(600.0, 9, 3)), True)
    costs = [RecordingCost(), RecordingCost()]
    replays = []
    for cost, policy in zip(costs, ("fcfs", "aged-srpt"), strict=True):
        config = EngineConfig(
            model, kv_cache_memory=2**23, max_model_len=128, max_batch_sequences=2, max_batch_tokens=8, scheduler=policy
        )
        clock = OwnClock()
        replays.append(Replay(Engine(config, clock, cost), clock, make_requests(trace, 100)))
    began = time.monotonic()
    side_by_side(replays, slice_seconds=0.001)
    assert time.monotonic() - began < 60  # ten idle minutes were jumped over
    for replay, cost in zip(replays, costs, strict=True):
        assert [item.num_tokens for item in replay.times] == [5, 1, 3]
        assert 600.0 < replay.times[2].first_token < 610.0
        assert all(item.arrival < item.first_token <= item.last_token for item in replay.times)
        assert sum(work.prefill_tokens + work.decodes for work, _ in cost.steps) == 34 + 4 + 2


def test_a_paused_clock_stands_still() -> None:
    clock = OwnClock()
    clock.resume()
    clock.jump(5.0)
    clock.pause()
    before = clock()
    time.sleep(0.01)
    assert clock() == before >= 5.0
