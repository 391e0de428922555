"""Replay a trace against a real engine in this process, on the wall clock, and record when its tokens came."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fastserve.bench.latencies import RequestTimes
from fastserve.core.request import Request

if TYPE_CHECKING:
    from fastserve.engine.engine import Engine


def replay(engine: Engine, requests: list[Request]) -> list[RequestTimes]:
    """Serve `requests` (in order of arrival, seconds from now) to the end; times are seconds from the start.

    A request that comes due during a step joins after it, and its wait counts from when it was due.
    """
    times = {item.request_id: RequestTimes(item.arrival_time, 0.0, 0.0, 0, item.tenant) for item in requests}
    started, upcoming = time.monotonic(), 0
    while upcoming < len(requests) or engine.has_work():
        now = time.monotonic() - started
        while upcoming < len(requests) and requests[upcoming].arrival_time <= now:
            item = requests[upcoming]
            engine.add(
                Request(
                    item.request_id,
                    item.prompt_ids,
                    item.sampling,
                    started + item.arrival_time,
                    item.priority,
                    item.tenant,
                )
            )
            upcoming += 1
        if not engine.has_work():
            time.sleep(max(0.0, requests[upcoming].arrival_time - now))
            continue
        outputs = engine.step()
        now = time.monotonic() - started
        for output in outputs:
            seen = times[output.request_id]
            if seen.num_tokens == 0:
                seen.first_token = now
            seen.num_tokens += len(output.token_ids)
            seen.last_token = now
    return list(times.values())
