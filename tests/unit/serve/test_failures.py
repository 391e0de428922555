"""When things go wrong under running requests: engine killed, clients gone, queue full, key missing, draining."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from fastserve.core.config import EngineConfig
from fastserve.serve.tenants import KeyRing
from tests.unit.engine.fake_engine import MAX_MODEL_LEN, REFUSE, WAIT
from tests.unit.serve.server import RunningServer, run_server

pytestmark = pytest.mark.slow  # many servers started

LONG = {"prompt": "abc", "max_tokens": 200}


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A server that makes 50 tokens per second, two sequences at a time, and lets two wait."""
    monkeypatch.setenv("FAKE_ENGINE_STEP", "0.02")
    config = EngineConfig(max_batch_sequences=2, max_batch_tokens=8, max_waiting=2)
    with run_server(tmp_path, config) as running:
        yield running


def until(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def events(lines) -> list[dict | str]:
    data = [line.removeprefix("data: ") for line in lines if line]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def metric(server: RunningServer, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    return sum(float(value) for value in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))


def test_kill_9_ends_streams_with_an_error_event_and_queued_requests_go_on(slow):
    waiting: list[httpx.Response] = []

    def wait() -> None:
        waiting.append(httpx.post(f"{slow.url}/v1/completions", json={"prompt": "x", "max_tokens": 3}, timeout=30))

    body = {**LONG, "n": 2, "stream": True}
    with httpx.stream("POST", f"{slow.url}/v1/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()
        next(lines)
        thread = threading.Thread(target=wait)
        thread.start()
        until(lambda: slow.client.num_live == 3)
        os.kill(slow.client.process_id, signal.SIGKILL)
        *_, last, done = events(lines)
    assert last["error"]["code"] == "engine_unavailable"
    assert done == "[DONE]"
    thread.join(30)
    assert waiting[0].json()["choices"][0]["text"] == "xxx"
    assert httpx.get(f"{slow.url}/ready").status_code == 200
    assert metric(slow, "fastserve_engine_restarts_total") == 1
    assert metric(slow, "fastserve_request_success_total") == 3  # two aborted, one length


def test_ready_tells_the_truth_while_the_engine_is_down(slow, monkeypatch, tmp_path):
    flag = tmp_path / "fails"
    monkeypatch.setenv("FAKE_ENGINE_FAILS", str(flag))
    flag.touch()
    os.kill(slow.client.process_id, signal.SIGKILL)
    until(lambda: httpx.get(f"{slow.url}/ready").status_code == 503)
    assert httpx.get(f"{slow.url}/ready").json()["reason"] == "engine restarting"
    assert httpx.get(f"{slow.url}/health").status_code == 200
    flag.unlink()
    until(lambda: httpx.get(f"{slow.url}/ready").status_code == 200)


def test_kill_9_answers_503_where_nothing_was_sent_yet(slow):
    replies: list[httpx.Response] = []

    def ask() -> None:
        replies.append(httpx.post(f"{slow.url}/v1/completions", json=LONG, timeout=30))

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: slow.client.stats.generation_tokens > 0)
    os.kill(slow.client.process_id, signal.SIGKILL)
    thread.join(10)
    assert replies[0].status_code == 503
    assert int(replies[0].headers["retry-after"]) > 0


def test_openai_client_raises_on_the_error_event(slow):
    with openai.OpenAI(base_url=f"{slow.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model="fake", stream=True, **LONG)
        next(stream)
        os.kill(slow.client.process_id, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="died"):
            list(stream)


def test_clients_that_vanish_free_the_engine(slow):
    with httpx.stream("POST", f"{slow.url}/v1/completions", json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        assert slow.client.num_live == 1
    until(lambda: slow.client.num_live == 0)
    body = json.dumps(LONG).encode()
    head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", int(slow.url.rpartition(":")[2]))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\n" + head + body)
        until(lambda: slow.client.num_live == 1)
    until(lambda: slow.client.num_live == 0 and slow.client.stats.num_running == 0, seconds=2)
    assert metric(slow, "fastserve_request_success_total") == 2


def test_a_full_queue_is_429_with_retry_after(slow):
    # The engine keeps WAIT requests without ever answering; four are all that may be here.
    body = {"prompt": [WAIT], "max_tokens": 5, "stream": True}
    streams = [httpx.Client(base_url=slow.url, timeout=20) for _ in range(4)]
    contexts = [client.stream("POST", "/v1/completions", json=body) for client in streams]
    try:
        for context in contexts:
            context.__enter__()
        until(lambda: slow.client.num_live == 4)
        response = httpx.post(f"{slow.url}/v1/completions", json=LONG)
        assert response.status_code == 429
        assert response.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert metric(slow, "fastserve_num_requests_waiting") >= 2
        too_many = httpx.post(f"{slow.url}/v1/completions", json={**LONG, "n": 5})
        assert too_many.status_code == 400
    finally:
        for context, client in zip(contexts, streams, strict=True):
            context.__exit__(None, None, None)
            client.close()
    until(lambda: slow.client.num_live == 0)


def test_a_refusal_of_the_engine_is_the_requests_error_and_nothing_more(slow):
    for stream in (False, True):
        body = {"prompt": [REFUSE], "max_tokens": 5, "stream": stream}
        response = httpx.post(f"{slow.url}/v1/completions", json=body)
        assert "this one is refused" in response.text
        assert response.status_code == (200 if stream else 400) and "invalid_request_error" in response.text
    assert httpx.post(f"{slow.url}/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_draining_refuses_new_requests_and_lets_running_ones_finish(slow):
    body = {"prompt": "abc", "max_tokens": 30, "stream": True}
    with httpx.stream("POST", f"{slow.url}/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        slow.api.generator.is_draining = True
        assert httpx.get(f"{slow.url}/ready").json() == {"status": "not ready", "reason": "draining"}
        refused = httpx.post(f"{slow.url}/v1/completions", json=LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert "retry-after" in refused.headers
        assert events(lines)[-2]["choices"][0]["finish_reason"] == "length"


def test_a_slow_reader_gets_every_token_and_holds_up_nobody(slow):
    body = {"prompt": "abcd", "max_tokens": 100, "stream": True}
    with httpx.stream("POST", f"{slow.url}/v1/completions", json=body) as response:
        time.sleep(1.0)
        quick = httpx.post(f"{slow.url}/v1/completions", json={"prompt": "x", "max_tokens": 2}, timeout=30)
        assert quick.status_code == 200
        *chunks, done = events(response.iter_lines())
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abcd" * 25
    assert done == "[DONE]"


def test_priority_is_refused_where_it_has_no_effect(slow):
    response = httpx.post(f"{slow.url}/v1/completions", json={"prompt": "a", "priority": 1})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "priority")


def test_metrics_add_up(slow):
    for _ in range(2):
        httpx.post(f"{slow.url}/v1/completions", json={"prompt": "abc", "max_tokens": 5})
    assert metric(slow, "fastserve_generation_tokens_total") == 10
    assert metric(slow, "fastserve_request_generation_tokens_sum") == 10
    assert metric(slow, "fastserve_request_prompt_tokens_sum") == 6
    assert metric(slow, "fastserve_time_to_first_token_seconds_count") == 2
    assert metric(slow, "fastserve_inter_token_latency_seconds_count") == 8
    assert metric(slow, "fastserve_time_per_output_token_seconds_count") == 2
    assert metric(slow, "fastserve_e2e_request_latency_seconds_count") == 2
    assert metric(slow, "fastserve_request_queue_time_seconds_count") == 2
    assert metric(slow, "fastserve_request_success_total") == 2


def test_every_route_but_health_needs_the_key(tmp_path):
    with run_server(tmp_path, keys=KeyRing({"secret-é": "one"})) as server:
        paths = httpx.get(f"{server.url}/openapi.json", headers=_bearer("secret-é")).json()["paths"]
        routes = [(method, path) for path, methods in paths.items() for method in methods]
        routes += [("get", "/docs"), ("get", "/openapi.json"), ("get", "/nowhere"), ("delete", "/v1/models")]
        assert len(routes) > 12
        for method, path in routes:
            for headers in ({}, _bearer("wrong"), {"Authorization": "secret"}):
                response = httpx.request(method, server.url + path, headers=headers)
                expected = 200 if path == "/health" else 401
                assert response.status_code == expected, (method, path)
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{server.url}/v1/models", headers=_bearer("secret-é")).status_code == 200
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def _bearer(key: str) -> dict[str, bytes]:
    return {"Authorization": f"Bearer {key}".encode()}


def test_all_of_the_context_can_be_used(slow):
    answer = httpx.post(
        f"{slow.url}/v1/completions", json={"prompt": [3] * (MAX_MODEL_LEN - 2), "max_tokens": 2}
    ).json()
    assert answer["usage"]["total_tokens"] == MAX_MODEL_LEN
