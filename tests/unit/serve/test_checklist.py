"""The server's checklist: what must hold at its edge, each test named by its point. Points that others show:

1 engine killed: test_failures (streams and queue), test_launch (exit status). 3 SIGTERM, second signal: test_launch.
4, 5, 6, 7 (clients gone, slow ones, odd bodies, ranges): also test_failures, test_limits, test_api_errors, test_fuzz,
e2e/test_server, benchmarks/clients.py and benchmarks/fuzz.py. 8 KV memory that runs out: parity/test_engine_identity.
12 long load: benchmarks/soak.py. 13 port in use: test_launch. 14 damaged model file: checkpoint/test_weights.
17 pinned versions: tests/unit/test_repository.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from prometheus_client import CollectorRegistry
from starlette.requests import Request

from fastserve.core.arrays import ModelSpec, PoolingRequest
from fastserve.core.config import EngineConfig
from fastserve.core.errors import ConfigError, QueueFullError, RequestError
from fastserve.core.metrics import CATALOGUE, NOT_IN_VLLM
from fastserve.engine.array_client import ArrayClient
from fastserve.serve.admission import Admission
from fastserve.serve.array_metrics import ArrayMetrics
from fastserve.serve.array_requests import ArrayRequests
from fastserve.serve.connection import BoundedConnection
from fastserve.serve.errors import ApiError
from fastserve.serve.limits import MAX_HEADER_BYTES
from fastserve.serve.tenants import KeyRing
from tests.conftest import REPOSITORY
from tests.unit.engine.fake_engine import HANG, WAIT
from tests.unit.serve.server import RunningServer, run_server

pytestmark = pytest.mark.slow  # many servers started

TEXT = {"prompt": "hi", "max_tokens": 2}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": TEXT,
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
    "/v1/batches": {"input_file_id": "file-1", "endpoint": "/v1/completions", "completion_window": "24h"},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [5]},
}


def until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def address(server: RunningServer) -> tuple[str, int]:
    return "127.0.0.1", int(server.url.rpartition(":")[2])


@pytest.mark.parametrize("how", ["stopped", "busy"])
def test_02_an_engine_that_hangs_is_found_and_started_again(tmp_path: Path, how: str) -> None:
    with run_server(tmp_path, stall_timeout=1.0) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        process_id = server.client.process_id
        if how == "stopped":
            os.kill(process_id, signal.SIGSTOP)
        body = {"prompt": [HANG] if how == "busy" else "a", "max_tokens": 3, "stream": True}
        lines = http.post("/v1/completions", json=body).text
        # It hung after the first token: the stream ends with an error. Before: the next engine answers.
        assert ("engine_unavailable" in lines) == (how == "busy")
        until(lambda: server.client.process_id not in (None, process_id))
        until(lambda: http.get("/ready").status_code == 200)


def test_04_a_thousand_vanishing_clients_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half-sent heads and bodies, streams left after their first bytes, answers that nobody waits for."""
    monkeypatch.setenv("FAKE_ENGINE_STEP", "0.005")
    body = json.dumps({"prompt": "abc", "max_tokens": 250, "stream": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    request = head % len(body) + body
    endless = json.dumps({"prompt": [WAIT], "max_tokens": 250}).encode()  # ends only when it is stopped
    waiting = head % len(endless) + endless
    kinds = [
        request[:20],
        request[: len(head) + 5],
        request[:-5],
        request,
        request + request,
        waiting,
        waiting + request,
    ]

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def vanish(server: RunningServer, count: int) -> None:
        async def one(number: int) -> None:
            async with limit:
                reader, writer = await asyncio.open_connection(*address(server))
                writer.write(kinds[number % len(kinds)])
                await writer.drain()
                if number % 2 and kinds[number % len(kinds)] is request:
                    await reader.read(50)
                writer.transport.abort()

        limit = asyncio.Semaphore(100)
        await asyncio.gather(*(one(number) for number in range(count)))

    def settle(server: RunningServer) -> tuple[int, int]:
        until(lambda: server.client.num_live == 0 and server.client.stats.num_running == 0, 60)
        count = asyncio.run_coroutine_threadsafe(count_tasks(), server.loop)
        return count.result(20), descriptors()

    async def count_tasks() -> int:
        await asyncio.sleep(0.3)
        return len(asyncio.all_tasks())

    with run_server(tmp_path, EngineConfig(max_waiting=2000)) as server:
        asyncio.run(vanish(server, 50))
        before = settle(server)
        asyncio.run(vanish(server, 1000))
        after = settle(server)
        assert after[0] <= before[0] + 3
        assert after[1] <= before[1] + 3
        assert server.api.generator._admission.num_tokens == 0


def test_05_a_reader_that_does_not_read_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoundedConnection, "write_seconds", 0.5)
    body = json.dumps({"prompt": "a", "max_tokens": 250, "stream": True, "logprobs": 20, "n": 64}).encode()
    with run_server(tmp_path) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(address(server))
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        until(lambda: server.client.num_live > 0)
        until(lambda: server.client.num_live == 0, 60)  # cut, or all was made before: then it is cut a little later
        time.sleep(3)
        # Cut in the middle: what was buffered ends without the last event.
        connection.settimeout(20)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(1 << 20):
                received += data
        assert b"[DONE]" not in received


def test_06_heads_that_are_too_long(tmp_path: Path) -> None:
    with run_server(tmp_path) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        for response, status in (
            (http.get("/health", params={"a": "x" * 10_000}), 414),
            (http.get("/health", headers={"a": "x" * 40_000}), 431),
            (http.get("/health", headers={f"a{number}": "x" for number in range(200)}), 431),
            (http.get("/health", headers={"a": "x" * 20_000}), 200),
        ):
            assert response.status_code == status
            assert status == 200 or response.json()["error"]["message"]
        with socket.create_connection(address(server)) as connection:  # a head without an end
            connection.settimeout(20)
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nA: ")
            reply = b""
            try:
                for _ in range(20):
                    connection.sendall(b"x" * MAX_HEADER_BYTES)
                    time.sleep(0.01)
            except OSError:
                pass
            try:
                reply = connection.recv(4096)
            except ConnectionResetError:
                return  # closed before all that it had been sent was read
            assert not reply or reply.startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize("path", list(BODIES))
def test_06_bodies_with_odd_json(http: httpx.Client, path: str) -> None:
    plain = json.dumps(BODIES[path])
    for text in (
        plain[:-1] + ', "temperature": NaN}',
        plain[:-1] + ', "temperature": Infinity}',
        plain[:-1] + ', "seed": ' + "9" * 5000 + "}",
        plain[:-1] + ', "x": ' + "[" * 5000 + "]" * 5000 + "}",
        plain[:-1] + ', "x": "\\ud800"}',
    ):
        response = http.post(path, content=text, headers={"content-type": "application/json"})
        assert response.status_code == 400, (text[:100], response.text)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    twice = plain[:-1] + ', "model": "fake", "model": "fake"}'
    assert http.post(path, content=twice, headers={"content-type": "application/json"}).status_code in (200, 400)


def wild_values(schema: dict[str, Any]) -> list[Any]:
    """Values of a field's own types that no field may take."""
    options = schema.get("anyOf", [schema])
    values: list[Any] = []
    for option in options:
        kind = option.get("type")
        if kind in ("integer", "number"):
            values += [10**30, -(10**30)]
        elif kind == "array":
            values.append([0] * 60_000 if option.get("items", {}).get("type") == "integer" else ["x"] * 40_000)
        elif kind == "string" and "enum" not in option and "const" not in option:
            values.append("x" * 150_000)
        elif kind == "object":
            values.append({str(number): 1 for number in range(10_000)})
    return values


def test_07_every_field_is_bounded(http: httpx.Client) -> None:
    """Walks the description: a huge value of the right type is refused in every field of every body."""
    schema = http.get("/openapi.json").json()
    num_checked = 0
    for path, body in BODIES.items():
        content = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        model = schema["components"]["schemas"][content["schema"]["$ref"].rpartition("/")[2]]
        for name, field in model["properties"].items():
            for value in wild_values(field):
                if (path, name) in {("/tokenize", "prompt"), ("/detokenize", "tokens")}:
                    continue  # bounded by the body's size alone
                response = http.post(path, json={**body, name: value})
                assert response.status_code in (400, 404, 413), (path, name, str(value)[:40], response.text[:200])
                num_checked += 1
    assert num_checked > 60


def test_07_cost_is_admitted_against_budgets(tmp_path: Path) -> None:
    config = EngineConfig(max_batch_sequences=8)
    with (
        run_server(tmp_path, config, max_queued_tokens=300) as server,
        httpx.Client(base_url=server.url, timeout=30) as http,
    ):
        for fields in ({"max_tokens": 300}, {"n": 10, "max_tokens": 40}, {"best_of": 10, "max_tokens": 40}):
            response = http.post("/v1/completions", json={"prompt": "a", **fields})
            assert (response.status_code, response.json()["error"]["param"]) == (400, "max_tokens")
        body = {"prompt": [WAIT], "max_tokens": 200, "stream": True}
        with http.stream("POST", "/v1/completions", json=body):
            until(lambda: server.client.num_live == 1)
            full = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 150}, timeout=30)
            assert full.status_code == 429
            assert int(full.headers["retry-after"]) > 0
            small = {"prompt": "a", "max_tokens": 20}
            assert httpx.post(f"{server.url}/v1/completions", json=small, timeout=30).status_code == 200
        until(lambda: server.api.generator._admission.num_tokens == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_07_a_deadline_ends_a_request(tmp_path: Path, stream: bool) -> None:
    with run_server(tmp_path, request_timeout=0.5) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        body = {"prompt": [WAIT], "max_tokens": 5, "stream": stream}
        for fields, headers in (({}, {}), ({"timeout": 0.1}, {}), ({}, {"X-Request-Timeout": "0.1"})):
            response = http.post("/v1/completions", json={**body, **fields}, headers=headers)
            assert response.status_code == (200 if stream else 504)
            assert "deadline_exceeded" in response.text
            assert server.client.num_live == 0
        for value in ("0", "-1", "x", "nan", "1e99"):
            refused = http.post("/v1/completions", json=TEXT, headers={"X-Request-Timeout": value})
            assert refused.status_code == 400


def test_07_a_client_may_give_less_time_than_the_server_to_any_request() -> None:
    """Of one that is answered once: encoders, tensors."""

    async def never(*_: Any) -> Any:
        await asyncio.sleep(60)

    arrays = ArrayClient([ModelSpec("a", {})], lambda frame: True, 3)
    client: Any = SimpleNamespace(capacity=9, check_count=lambda count: None, run=never)
    requests = ArrayRequests(client, Admission(), ArrayMetrics(arrays, CollectorRegistry()), lambda: None, 1.0)
    for value, word in (("0.01", "within 0.01 s"), ("x", "must be seconds")):
        head = {"type": "http", "headers": [(b"x-request-timeout", value.encode())], "state": {}}
        with pytest.raises(ApiError, match=word):
            asyncio.run(requests.run(Request(head, never), [PoolingRequest("1", "a", [1])], 1))


def test_08_what_does_not_fit_is_refused_or_waits(tmp_path: Path) -> None:
    """Memory for keys and values is planned at start; here: a queue that is full refuses and the server lives."""
    config = EngineConfig(max_batch_sequences=1, max_batch_tokens=8, max_waiting=1)
    with run_server(tmp_path, config) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        assert http.post("/v1/completions", json={**TEXT, "n": 3}).status_code == 400
        assert http.post("/v1/completions", json={**TEXT, "n": 2}).status_code == 200


def test_09_a_full_disk_fails_the_batch_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        run_server(tmp_path / "model", state_folder=str(tmp_path / "state"), max_state_bytes=1700) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client,
    ):
        lines = [
            {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": TEXT} for number in range(9)
        ]
        content = "\n".join(map(json.dumps, lines)).encode()
        file = client.files.create(file=("a", content), purpose="batch")
        with pytest.raises(openai.APIStatusError) as error:
            client.files.create(file=("a", content), purpose="batch")
        assert error.value.status_code == 413
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        until(lambda: client.batches.retrieve(batch.id).status == "failed")
        failed = client.batches.retrieve(batch.id)
        assert "max_state_bytes" in failed.errors.data[0].message
        kept = client.files.content(failed.output_file_id).text.splitlines()
        assert 0 < len(kept) == failed.request_counts.completed < 9
        assert client.completions.create(model="fake", prompt="ab", max_tokens=2).choices[0].text == "ab"


def test_10_every_route_needs_a_key_and_keys_stay_secret(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = KeyRing({"first-secret": "A", "second-secret": "B"})
    with run_server(tmp_path, keys=keys) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        good = {"Authorization": "Bearer second-secret"}
        paths = http.get("/openapi.json", headers=good).json()["paths"]
        assert len(paths) >= 18
        for path in [*paths, "/docs", "/openapi.json", "/nowhere", "/health/", "//health", "/HEALTH"]:
            for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "HEAD"):
                for headers in ({}, {"Authorization": "Bearer first"}, {"Authorization": "Basic first-secret"}):
                    if path == "/health":
                        continue
                    response = http.request(method, path.replace("{", "").replace("}", ""), headers=headers)
                    assert response.status_code == 401, (method, path)
        assert http.get("/health").status_code == 200
        assert http.get("/v1/models", headers={"authorization": "bearer first-secret"}).status_code == 200
        texts = [http.get(path, headers=good).text for path in ("/metrics", "/openapi.json", "/docs", "/v1/models")]
        texts.append(http.post("/v1/completions", json={"prompt": 5}, headers=good).text)
        assert not any("secret" in text for text in [*texts, caplog.text])


def test_10_key_files(tmp_path: Path) -> None:
    from fastserve.core.config import ServeConfig

    file = tmp_path / "keys"
    config = ServeConfig(api_key_file=str(file))
    for text in (None, "", "# none\n\n", "a b c\n", "same\nsame\n"):
        if text is not None:
            file.write_text(text)
        with pytest.raises(ConfigError, match="api_key_file"):
            KeyRing.load(config)
    file.write_text("# keys\nalone\nteam one\n team two \n")
    ring = KeyRing.load(config)
    assert ring.num_tenants == 2
    assert ring.tenant(b"Bearer one") == ring.tenant(b"Bearer two") == "team"
    own = ring.tenant(b"Bearer alone")
    assert own and "alone" not in own
    for header in (b"", b"Bearer", b"Bearer three", b"one", b"Basic one", b"Bearer one "):
        assert ring.tenant(header) is None
    assert KeyRing.load(ServeConfig(api_key="x")).tenant(b"Bearer x")
    assert not KeyRing.load(ServeConfig())


def test_11_prompts_are_not_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with run_server(tmp_path) as server, httpx.Client(base_url=server.url, timeout=30) as http:
        http.post("/v1/completions", json={"prompt": "marmalade", "max_tokens": 9})
        http.post("/v1/completions", json={"prompt": "marmalade", "max_tokens": -9})
        http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "marmalade"}], "tools": "x"})
        os.kill(server.client.process_id, signal.SIGKILL)
        until(lambda: server.client.num_restarts == 1)
    assert "engine" in caplog.text
    assert "marmalade" not in caplog.text


def test_15_time_is_monotonic_where_it_is_measured() -> None:
    """The wall clock dates objects for people; nothing waits or is timed by it, but the day that a batch has."""
    rooms = ("scheduler", "engine", "serve")
    found = {
        f"{path.parent.name}/{path.name}"
        for room in rooms
        for path in (REPOSITORY / "fastserve" / room).glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("time.time", "datetime.now", "datetime.datetime.now")
    }
    allowed = {"app.py", "encoders.py", "replies.py", "responses_reply.py", "files.py", "batches.py"}
    assert found == {f"serve/{name}" for name in allowed}


def test_16_one_key_does_not_starve_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_ENGINE_STEP", "0.02")
    keys = KeyRing({"greedy": "A", "modest": "B"})
    config = EngineConfig(max_batch_sequences=2, max_batch_tokens=8, max_waiting=18, scheduler="fair")
    with run_server(tmp_path, config, keys=keys) as server:
        statuses: list[int] = []

        def ask(key: str, prompt: Any, max_tokens: int) -> httpx.Response:
            headers = {"Authorization": f"Bearer {key}"}
            body = {"prompt": prompt, "max_tokens": max_tokens}
            return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60)

        threads = [
            threading.Thread(target=lambda: statuses.append(ask("greedy", "a", 40).status_code)) for _ in range(40)
        ]
        for thread in threads:
            thread.start()
        until(lambda: statuses.count(429) > 10)
        assert server.client.num_live <= 11
        assert ask("modest", "b", 2).status_code == 200
        for thread in threads:
            thread.join(60)
        assert statuses.count(200) + statuses.count(429) == 40
        tenants = {live.request.tenant for live in server.client._live.values()}
        assert tenants == set()
        headers = {"Authorization": "Bearer modest"}
        text = httpx.get(f"{server.url}/metrics", headers=headers, timeout=30).text
    counted = {
        (name, tenant): float(value)
        for name, tenant, value in re.findall(
            r'^fastserve_tenant_(\w+)_total{.*tenant="(\w)"} (\S+)$', text, re.MULTILINE
        )
    }
    assert counted["requests", "A"] == statuses.count(200)
    assert counted["requests_refused", "A"] == statuses.count(429)
    assert counted["generation_tokens", "B"] == 2


def test_16_places_are_kept_for_others() -> None:
    admission = Admission(is_shared=True)
    leave = [admission.enter("A", 1, 10, 10, 1000) for _ in range(5)]
    with pytest.raises(QueueFullError, match="other keys"):
        admission.enter("A", 1, 10, 10, 1000)
    leave += [admission.enter("B", 1, 10, 10, 1000) for _ in range(2)]
    with pytest.raises(QueueFullError):
        admission.enter("B", 2, 10, 10, 1000)
    assert admission.num_tokens == 70
    for end in (*leave, *leave):
        end()
    assert admission.num_tokens == 0
    alone = Admission()
    for _ in range(10):
        alone.enter("", 1, 10, 10, 1000)
    with pytest.raises(RequestError, match="2000 tokens"):
        alone.enter("", 1, 2000, 10, 1000)


def test_metrics_have_the_names_of_vllm_when_asked_for(tmp_path: Path) -> None:
    with run_server(tmp_path, metrics_compat="vllm") as server:
        httpx.post(f"{server.url}/v1/completions", json={"prompt": "abc", "max_tokens": 5}, timeout=30)
        text = httpx.get(f"{server.url}/metrics", timeout=30).text
    for metric in CATALOGUE:
        assert (f"# TYPE vllm:{metric.name}" in text) == (metric.name not in NOT_IN_VLLM), metric.name
    pattern = r'^vllm:generation_tokens_total{engine="0",model_name="fake"} (\S+)$'
    assert float(re.search(pattern, text, re.MULTILINE)[1]) == 5
    assert "fastserve_generation_tokens_total" in text
