"""Files and batches by the `openai` client: bounded, private to their tenant, and taken up again after an end."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path

import httpx
import openai
import pytest

from fastserve.core.errors import ConfigError
from fastserve.serve.errors import ApiError
from fastserve.serve.files import StateFolder, WholeFile
from fastserve.serve.tenants import KeyRing
from tests.unit.engine.fake_engine import REFUSE
from tests.unit.serve.server import RunningServer, run_server

LIVE = ("validating", "in_progress", "finalizing", "cancelling")


def line(custom_id: str, url: str = "/v1/completions", **body) -> dict:
    body = body or {"prompt": custom_id, "max_tokens": 2}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def upload(client: openai.OpenAI, lines: list) -> str:
    text = "\n".join(item if isinstance(item, str) else json.dumps(item) for item in lines)
    return client.files.create(file=("in.jsonl", io.BytesIO(text.encode())), purpose="batch").id


def run_batch(client: openai.OpenAI, lines: list, endpoint: str = "/v1/completions"):
    batch = client.batches.create(
        input_file_id=upload(client, lines), endpoint=endpoint, completion_window="24h", metadata={"a": "b"}
    )
    return wait(client, batch.id)


def wait(client: openai.OpenAI, batch_id: str):
    deadline = time.monotonic() + 60
    while (batch := client.batches.retrieve(batch_id)).status in LIVE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return batch


def results(client: openai.OpenAI, file_id: str) -> dict[str, dict]:
    found = map(json.loads, client.files.content(file_id).text.splitlines())
    return {item["custom_id"]: item["response"] for item in found}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def files(tmp_path: Path, state: Path):
    with run_server(tmp_path / "model", state_folder=str(state)) as server:
        yield server


@pytest.fixture
def api(files: RunningServer):
    with openai.OpenAI(base_url=f"{files.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_batches_of_every_endpoint(api: openai.OpenAI):
    batch = run_batch(api, [line("ab"), line("cd"), line("bad", prompt="a", temperature=-1)])
    assert (batch.status, batch.metadata) == ("completed", {"a": "b"})
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (3, 2, 1)
    answers = results(api, batch.output_file_id)
    assert {name: item["body"]["choices"][0]["text"] for name, item in answers.items()} == {"ab": "ab", "cd": "cd"}
    failed = results(api, batch.error_file_id)
    assert failed["bad"]["status_code"] == 400
    assert failed["bad"]["body"]["error"]["param"] == "temperature"
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    for url, body in (("/v1/chat/completions", chat), ("/v1/responses", {"input": "hello", "max_output_tokens": 3})):
        batch = run_batch(api, [line("x", url, **body)], url)
        assert results(api, batch.output_file_id)["x"]["status_code"] == 200
    assert [item.id for item in api.batches.list(limit=1).data] == [batch.id]
    # A refusal of the engine's is an answer too.
    batch = run_batch(api, [line("x", prompt=[REFUSE])])
    assert results(api, batch.error_file_id)["x"]["status_code"] == 400


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["{"],
        ["[" * 5000],
        [line("a"), line("a")],
        [line("")],
        [line("a", "/v1/models")],
        [line("a", prompt="x", stream=True)],
        [{**line("a"), "method": "GET"}],
        [{**line("a"), "body": 5}],
    ],
)
def test_files_that_are_no_batch(api: openai.OpenAI, lines: list):
    batch = run_batch(api, lines)
    assert batch.status == "failed"
    assert batch.errors.data[0].code == "invalid_input_file"
    assert batch.errors.data[0].message


def test_files(api: openai.OpenAI, files: RunningServer, state: Path):
    first, second = (upload(api, [line(name)]) for name in "ab")
    assert [file.id for file in api.files.list(order="asc").data] == [first, second]
    assert api.files.retrieve(first).bytes == len(json.dumps(line("a")))
    api.files.delete(first)
    with pytest.raises(openai.NotFoundError):
        api.files.content(first)
    for bad in ("../lock", "..%2Flock", "%00", second + "/../lock"):
        assert httpx.get(f"{files.url}/v1/files/{bad}").status_code == 404
    with httpx.Client(base_url=files.url) as http:
        for fields in (
            {"json": {}},
            {"data": {"purpose": "batch"}},
            {"files": {"file": b"x"}},
            {"files": {"file": b"x"}, "data": {"purpose": "fine-tune"}},
            {"files": {"file": b"x"}, "data": {"purpose": "batch", "expires_after": "1"}},
            {"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data; boundary=x"}},
            {"content": b"", "headers": {"content-type": "multipart/form-data"}},
        ):
            response = http.post("/v1/files", **fields)
            assert response.status_code == 400, (fields, response.text)
    assert sorted(path.name for path in (state / "files").iterdir()) == [f"{second}.json", f"{second}.jsonl"]


def test_a_batch_that_was_interrupted_goes_on(tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAKE_ENGINE_STEP", "0.02")
    lines = [line(f"{number}", prompt="abc", max_tokens=20) for number in range(200)]
    with (
        run_server(tmp_path / "model", state_folder=str(state)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client,
    ):
        batch = client.batches.create(
            input_file_id=upload(client, lines), endpoint="/v1/completions", completion_window="24h"
        )
        while client.batches.retrieve(batch.id).request_counts.completed < 10:
            time.sleep(0.02)
    [file] = [path for path in (state / "files").glob("*.jsonl") if "status_code" in path.read_text()]
    num_before = len(file.read_text().splitlines())
    assert 10 <= num_before < 200
    with file.open("a") as output:
        output.write('{"custom_id": "half')  # the server died while it wrote
    monkeypatch.setenv("FAKE_ENGINE_STEP", "0.001")
    with (
        run_server(tmp_path / "model", state_folder=str(state)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client,
    ):
        batch = wait(client, batch.id)
        assert (batch.status, batch.request_counts.completed) == ("completed", 200)
        text = client.files.content(batch.output_file_id).text
        names = [json.loads(item)["custom_id"] for item in text.splitlines()]
        assert sorted(names, key=int) == [str(number) for number in range(200)]
        before = server.client.totals.generation_tokens
        assert before <= 20 * (200 - num_before)


def test_a_batch_can_be_cancelled(tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FAKE_ENGINE_STEP", "0.02")
    with (
        run_server(tmp_path / "model", state_folder=str(state)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client,
    ):
        lines = [line(f"{number}", prompt="abc", max_tokens=20) for number in range(300)]
        batch = client.batches.create(
            input_file_id=upload(client, lines), endpoint="/v1/completions", completion_window="24h"
        )
        assert client.batches.cancel(batch.id).status == "cancelling"
        batch = wait(client, batch.id)
        assert batch.status == "cancelled"
        assert batch.request_counts.completed < 300
        with pytest.raises(openai.BadRequestError):
            client.batches.cancel(batch.id)


def test_tenants_do_not_see_each_other(tmp_path: Path, state: Path):
    keys = KeyRing({"one": "A", "two": "B"})
    with run_server(tmp_path / "model", state_folder=str(state), keys=keys) as server:
        one, two = (openai.OpenAI(base_url=f"{server.url}/v1", api_key=key) for key in ("one", "two"))
        with one, two:
            batch = run_batch(one, [line("ab")])
            assert batch.status == "completed"
            assert two.batches.list().data == two.files.list().data == []
            for call in (
                lambda: two.batches.retrieve(batch.id),
                lambda: two.files.content(batch.output_file_id),
                lambda: two.files.delete(batch.input_file_id),
                lambda: two.batches.create(
                    input_file_id=batch.input_file_id, endpoint="/v1/completions", completion_window="24h"
                ),
            ):
                with pytest.raises(openai.NotFoundError):
                    call()


def test_without_a_state_folder_it_is_told_how_to_get_one(http: httpx.Client):
    for method, path in (("GET", "/v1/files"), ("GET", "/v1/batches"), ("POST", "/v1/files"), ("GET", "/v1/files/x")):
        response = http.request(method, path)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "no_state_folder")


def test_room(tmp_path: Path):
    folder = StateFolder.open(str(tmp_path / "a"), 100)
    with pytest.raises(ConfigError, match="another server"):
        StateFolder.open(str(tmp_path / "a"), 100)
    with WholeFile(folder.content("f")) as file:
        file.write(b"x" * 90)
    folder.register("f", "name" * 100, "batch", "")
    folder.check_room(10)
    with pytest.raises(ApiError, match="no room"):
        folder.check_room(11)
    folder.close()
    again = StateFolder.open(str(tmp_path / "a"), 100)
    assert [file.bytes for file in again.files("")] == [90]
    again.delete("f", "")
    assert os.listdir(tmp_path / "a" / "files") == []
    again.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot use"):
        StateFolder.open(str(tmp_path / "file"), 100)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path):
    with pytest.raises(RuntimeError), WholeFile(tmp_path / "x") as file:
        file.write(b"half")
        raise RuntimeError
    assert os.listdir(tmp_path) == []
