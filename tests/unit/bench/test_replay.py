"""A trace against the real engine: every token is recorded, arrivals are kept to."""

from __future__ import annotations

from pathlib import Path

from fastserve.bench.replay import replay
from fastserve.bench.simulate import make_requests
from fastserve.bench.traces import Trace, TraceRequest
from fastserve.core.config import EngineConfig
from fastserve.engine.engine import Engine
from tests import folders


def test_replay_keeps_arrivals_and_counts_every_token(tmp_path: Path) -> None:
    engine = Engine(
        EngineConfig(
            str(folders.llama(tmp_path / "llama")), kv_cache_memory=2**23, max_model_len=128, max_batch_sequences=2
        )
    )
    trace = Trace("t", (TraceRequest(0.0, 20, 5), TraceRequest(0.0, 5, 1), TraceRequest(0.6, 9, 3)), True)
    times = replay(engine, make_requests(trace, 100))
    assert [item.num_tokens for item in times] == [5, 1, 3]
    assert times[2].first_token >= 0.6
    assert all(item.arrival < item.first_token <= item.last_token for item in times)
    assert not engine.has_work()
