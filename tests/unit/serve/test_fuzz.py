"""Random requests over the OpenAPI description: no internal error. benchmarks/fuzz.py sends as many as one likes."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from benchmarks.fuzz import Fuzzer, Mixer, body_schema, shorten
from tests.unit.serve.server import run_server
from tests.unit.serve.test_checklist import BODIES

ODD: list[Any] = [
    None, True, 0, -1, 10**30, 1e308, 1e999, "", "\ud800", "\0", "none", "x" * 2000, [], [[]], [None], [1], ["a"],
    {}, {"a": {}}, {"type": "function"}, {"type": "json_schema"}, [{"role": "user"}], [{"type": "function"}],
]  # fmt: skip


def test_mixed_bodies_are_no_internal_error(http: httpx.Client) -> None:
    """Every field of every body with odd values and with right ones, in random company."""
    description = http.get("/openapi.json").json()
    statuses: dict[int, int] = {}
    for path, body in BODIES.items():
        mixer = Mixer(body_schema(description, path), seed=3)
        for value in ODD:
            mixer.take(dict.fromkeys(mixer.fields, value))
        for _ in range(40):
            mixer.take(body)
        for _ in range(60):
            mixed = {**mixer.make(), **({} if len(statuses) % 2 else body)}
            shorten(path, mixed)
            text = json.dumps(mixed)
            status = http.post(path, content=text, headers={"content-type": "application/json"}).status_code
            assert status < 500 or (status == 504 and mixed.get("timeout")), (path, status, text[:500])
            statuses[status] = statuses.get(status, 0) + 1
    assert statuses[200] > 20
    assert statuses[400] > 100


@pytest.mark.slow
def test_random_requests_are_no_internal_error(tmp_path) -> None:
    pytest.importorskip("schemathesis")
    with run_server(tmp_path / "model", state_folder=str(tmp_path / "state")) as server:
        findings = Fuzzer(server.url, seed=1).run(500)
    assert findings.faults == []
    assert findings.statuses[200] > 20
    assert findings.statuses[400] > 200
    assert len(findings.routes) >= 20
