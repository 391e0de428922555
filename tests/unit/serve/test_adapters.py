"""LoRA adapters over HTTP, with a fake engine: loading, naming, unloading while in use, and a restart."""

from __future__ import annotations

import os
import signal
import threading
import time

import httpx
import pytest

from fastserve.core.config import EngineConfig
from tests.unit.engine.fake_engine import WAIT
from tests.unit.serve.server import run_server


@pytest.fixture
def server(tmp_path):
    (tmp_path / "fox").mkdir()
    with run_server(tmp_path / "model", EngineConfig(lora=(f"fox={tmp_path / 'fox'}",), max_loras=2)) as running:
        yield running


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


def models(http) -> dict[str, str | None]:
    return {entry["id"]: entry.get("parent") for entry in http.get("/v1/models").json()["data"]}


def complete(http, model: str) -> httpx.Response:
    return http.post("/v1/completions", json={"model": model, "prompt": "hi", "max_tokens": 2})


def test_an_adapter_is_a_model(http):
    assert models(http) == {"fake": None, "fox": "fake"}
    assert http.get("/v1/models/fox").json()["parent"] == "fake"
    for path, body in (
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/responses", {"input": "hi"}),
    ):
        answer = http.post(path, json={"model": "fox", **body})
        assert answer.status_code == 200 and answer.json()["model"] == "fox", path


def test_load_and_unload(http, tmp_path):
    assert complete(http, "bear").status_code == 404
    body = {"lora_name": "bear", "lora_path": str(tmp_path)}
    assert http.post("/v1/load_lora_adapter", json=body).status_code == 200
    assert models(http) == {"fake": None, "fox": "fake", "bear": "fake"}
    assert complete(http, "bear").json()["model"] == "bear"
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "bear"}).status_code == 200
    assert complete(http, "bear").status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("load", {"lora_name": "x", "lora_path": "/nowhere"}, "lora_path"),
        ("load", {"lora_name": "fake", "lora_path": "/tmp"}, "lora_name"),
        ("load", {"lora_name": "a=b", "lora_path": "/tmp"}, "lora_name"),
        ("load", {"lora_name": "x"}, "lora_path"),
        ("unload", {"lora_name": "nobody"}, "lora_name"),
    ],
)
def test_bad_requests(http, path, body, param):
    answer = http.post(f"/v1/{path}_lora_adapter", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_unloading_waits_for_those_who_use_it(http, server):
    generation = {"model": "fox", "prompt": [WAIT], "max_tokens": 2, "stream": True}
    unload = {"lora_name": "fox"}
    unloading = threading.Thread(target=lambda: http.post("/v1/unload_lora_adapter", json=unload))
    with http.stream("POST", "/v1/completions", json=generation):
        unloading.start()
        while "fox" in models(http):
            time.sleep(0.01)
        assert complete(http, "fox").status_code == 404
        assert server.client.num_live == 1 and unloading.is_alive()
    unloading.join(30)
    assert not unloading.is_alive() and server.client.num_live == 0


def test_adapters_survive_the_engine(http, server, tmp_path):
    http.post("/v1/load_lora_adapter", json={"lora_name": "bear", "lora_path": str(tmp_path)})
    os.kill(server.client.process_id, signal.SIGKILL)
    while server.client.num_restarts == 0 or http.get("/ready").status_code != 200:
        time.sleep(0.02)
    assert list(server.client.adapters) == ["fox", "bear"]
    assert complete(http, "bear").status_code == 200
