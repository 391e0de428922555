"""What hostile or broken clients may do: slow headers, slow bodies, odd values, hundreds of dropped connections."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fastserve.serve.connection import BoundedConnection
from fastserve.serve.errors import ApiError
from fastserve.serve.limits import BodyLimit
from fastserve.serve.openai import ChatBody, CompletionBody
from tests.unit.serve.server import RunningServer, run_server


def closes_within(connection: socket.socket, seconds: float) -> bool:
    connection.settimeout(seconds)
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    return True


@pytest.mark.slow
def test_half_sent_headers_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(BoundedConnection, "header_seconds", 0.4)
    with run_server(tmp_path) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        for first in (b"", b"GET /health HTTP/1.1\r\nHost:", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /hea"):
            with socket.create_connection(address) as connection:
                connection.sendall(first)
                assert closes_within(connection, 5), first
        body = {"prompt": "abc", "max_tokens": 250}
        monkeypatch.setenv("FAKE_ENGINE_STEP", "0.01")
        with httpx.Client(base_url=server.url) as client:
            for _ in range(2):  # a slow answer on a connection that is kept is not cut
                assert client.post("/v1/completions", json=body, timeout=30).status_code == 200
                time.sleep(0.6)


def run_body_limit(messages: list[dict], timeout: float = 5.0, headers: tuple = ()) -> tuple[list[dict], list[bytes]]:
    """What BodyLimit(10 bytes) sends, and the bodies that reach the app."""
    sent: list[dict] = []
    seen: list[bytes] = []

    async def app(scope, receive, send):
        seen.append((await receive())["body"])

    async def receive():
        if messages:
            return messages.pop(0)
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": list(headers)}
    asyncio.run(BodyLimit(app, 10, timeout)(scope, receive, send))
    return sent, seen


def chunk(body: bytes, more: bool = False) -> dict:
    return {"type": "http.request", "body": body, "more_body": more}


def test_body_limit():
    assert run_body_limit([chunk(b"12345", True), chunk(b"67890")]) == ([], [b"1234567890"])
    assert run_body_limit([chunk(b"12345", True), {"type": "http.disconnect"}]) == ([], [])
    for messages, timeout, headers, status in (
        ([chunk(b"12345", True), chunk(b"678901", True)], 5, (), 413),
        ([], 5, ((b"content-length", b"11"),), 413),
        ([chunk(b"123", True)], 0.05, (), 408),
    ):
        sent, seen = run_body_limit(messages, timeout, headers)
        assert (sent[0]["status"], seen) == (status, [])
        assert (b"connection", b"close") in sent[0]["headers"]
        assert "error" in json.loads(sent[1]["body"])


def test_dropped_streams_leave_nothing_behind(server: RunningServer, http: httpx.Client):
    def tasks() -> int:
        async def count() -> int:
            return len(asyncio.all_tasks())

        return asyncio.run_coroutine_threadsafe(count(), server.loop).result(10)

    def drop(times: int) -> tuple[int, int]:
        for _ in range(times):
            body = {"prompt": "abc", "max_tokens": 250, "stream": True, "n": 2}
            with http.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
        deadline = time.monotonic() + 60
        while server.client.num_live or server.client.stats.num_running or tasks() > settled:
            assert time.monotonic() < deadline, "something was left behind"
            time.sleep(0.02)
        return tasks(), len(os.listdir("/proc/self/fd"))

    settled = tasks() + 3  # tasks of connections that are being closed
    before = drop(10)
    after = drop(100)
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1] + 2


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)
# Lengths are kept small, so that a lucky draw does not run long.
near = st.integers(-3, 40) | st.floats(-3, 3) | values


@pytest.mark.parametrize("kind", [ChatBody, CompletionBody])
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_body_is_an_internal_error(http: httpx.Client, kind, data):
    names = st.sampled_from([name for name in kind.model_fields if name not in ("max_tokens", "max_completion_tokens")])
    fields = data.draw(st.dictionaries(names, near, max_size=5))
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, **fields}
    if kind is CompletionBody:
        body = {"prompt": "x", "max_tokens": 2, **fields}
    path = "/v1/chat/completions" if kind is ChatBody else "/v1/completions"
    content = json.dumps(body).encode()
    response = http.post(path, content=content, headers={"content-type": "application/json"})
    allowed = (200, 400, 404, 504) if "timeout" in fields else (200, 400, 404)  # a time limit may be a short one
    assert response.status_code in allowed, (fields, response.text)


@pytest.mark.parametrize("field", ["prompt", "stop", "stop_token_ids", "logit_bias", "messages"])
def test_a_million_faults_are_one_error(http: httpx.Client, field):
    """pydantic would otherwise make an object for each of them."""
    path = "/v1/chat/completions" if field == "messages" else "/v1/completions"
    value = {str(number): [] for number in range(15_000)} if field == "logit_bias" else [[None]] * 25_000
    body = {"messages": [{"role": "user", "content": "x"}]} if field == "messages" else {"prompt": "x"}
    response = http.post(path, json={**body, field: value})
    assert response.status_code == 400 and len(response.text) < 1000
    kind = ChatBody if field == "messages" else CompletionBody
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({**body, field: value})
    assert caught.value.error_count() <= 16  # one for each form that the field may take


def test_api_errors_carry_their_status():
    error = ApiError("x", 418, param="p", code="c", retry_after=2)
    assert (error.http_status, error.param, error.code, error.retry_after) == (418, "p", "c", 2)
