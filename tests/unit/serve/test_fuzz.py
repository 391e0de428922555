"""A few hundred random requests over the OpenAPI description; benchmarks/fuzz.py sends as many as one likes."""

from __future__ import annotations

import pytest

from benchmarks.fuzz import fuzz
from tests.unit.serve.server import run_server


@pytest.mark.slow
def test_random_requests_are_no_internal_error(tmp_path) -> None:
    pytest.importorskip("schemathesis")
    with run_server(tmp_path / "model", state_folder=str(tmp_path / "state")) as server:
        findings = fuzz(server.url, 400)
    assert findings.faults == []
    assert findings.statuses.total() > 250
    assert findings.statuses[200] > 10
    assert findings.statuses[400] > 100
