"""Replies against OpenAI's own API description, where this machine has it (shared data); each kind of reply once."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.folders import write_tokenizer
from tests.unit.serve.server import RunningServer, run_server
from tests.unit.serve.test_responses_tools import CALL, TEMPLATE, TOOL

MESSAGES = [{"role": "user", "content": "hello"}]
CHAT_TOOL = {"type": "function", "function": {"name": TOOL["name"], "parameters": TOOL["parameters"]}}
LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}


class Description:
    """OpenAI's description; `check` raises where a value does not fit a schema of it."""

    def __init__(self, file: Path) -> None:
        import yaml

        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        loaded = yaml.load(gzip.decompress(file.read_bytes()), Loader=loader)
        self._schemas = json.loads(json.dumps(loaded["components"]["schemas"], default=str))  # YAML knows dates
        self._validators: dict[str, Any] = {}

    def check(self, name: str, value: Any) -> None:
        import jsonschema_rs

        if name not in self._validators:
            schemas: dict[str, Any] = {}
            self._collect(name, schemas)
            schema = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}}
            self._validators[name] = jsonschema_rs.Draft202012Validator(schema)
        error = next(self._validators[name].iter_errors(value), None)
        assert error is None, f"{name}: {error}"

    def _collect(self, name: str, found: dict[str, Any]) -> None:
        """The schema `name` and all that it refers to: the whole description takes long to compile."""
        found[name] = self._schemas[name]
        for other in re.findall(r'"#/components/schemas/(\w+)"', json.dumps(found[name])):
            if other not in found:
                self._collect(other, found)


@pytest.fixture(scope="module")
def description(shared_data: Path) -> Description:
    file = shared_data / "api" / "openai_openapi.yaml.gz"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    return Description(file)


def post(http: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def events(http: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    lines = http.post(path, json={**body, "stream": True}).text.splitlines()
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(item) for item in data if item != "[DONE]"]


def test_the_check_finds(description: Description) -> None:
    with pytest.raises(AssertionError, match="OpenAIFile"):
        description.check("OpenAIFile", {"id": "x", "object": "file"})


def test_completions_and_chats(http: httpx.Client, description: Description) -> None:
    for body in (
        {"prompt": "abc", "max_tokens": 3},
        {"prompt": ["abc", "d"], "max_tokens": 3, "n": 2, "best_of": 3, "stop": "z"},
        {"prompt": "abc", "max_tokens": 3, "logprobs": 2},
        {"prompt": "abc", "max_tokens": 3, "echo": True},
    ):
        description.check("CreateCompletionResponse", post(http, "/v1/completions", **body))
    for body in ({}, {"n": 2, "logprobs": True, "top_logprobs": 2}, {"stop": ["lo"]}):
        fields = {"messages": MESSAGES, "max_tokens": 9, **body}
        description.check("CreateChatCompletionResponse", post(http, "/v1/chat/completions", **fields))
        options = {"stream_options": {"include_usage": True}}
        for event in events(http, "/v1/chat/completions", **fields, **options):
            for choice in event["choices"]:
                # OpenAI's own service sends null in these two places, which its description does not allow.
                choice["finish_reason"] = choice["finish_reason"] or "stop"
                if "logprobs" in choice:
                    assert choice["logprobs"].pop("refusal") is None
                    choice["logprobs"]["refusal"] = []
            description.check("CreateChatCompletionStreamResponse", event)
    description.check("ListModelsResponse", http.get("/v1/models").json())
    description.check("ErrorResponse", http.post("/v1/completions", json={"prompt": 5}).json())


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = write_tokenizer(tmp_path_factory.mktemp("hermes"), TEMPLATE)
    with run_server(folder) as server:
        yield server.url


def test_calls_and_thoughts(hermes: str, description: Description) -> None:
    """Both endpoints, whole and streamed; what they answered is taken back as the next turn."""
    text = f"hm</think>Yes.\n<tool_call>\n{CALL}\n</tool_call>"
    thinking = {"chat_template_kwargs": {"think": True}}
    with httpx.Client(base_url=hermes, timeout=30) as http:
        chat = {"messages": [{"role": "user", "content": text}], "max_tokens": 120, "tools": [CHAT_TOOL], **thinking}
        whole = post(http, "/v1/chat/completions", **chat)
        description.check("CreateChatCompletionResponse", whole)
        message = whole["choices"][0]["message"]
        assert message["tool_calls"] and message["reasoning_content"]
        for event in events(http, "/v1/chat/completions", **chat):
            for choice in event["choices"]:
                choice["finish_reason"] = choice["finish_reason"] or "stop"
            description.check("CreateChatCompletionStreamResponse", event)
        turn = {"input": text, "max_output_tokens": 120, "tools": [TOOL], **LOGPROBS, **thinking}
        reply = post(http, "/v1/responses", **turn)
        description.check("Response", reply)
        assert {item["type"] for item in reply["output"]} == {"reasoning", "message", "function_call"}
        kinds = set()
        for event in events(http, "/v1/responses", **turn):
            description.check("ResponseStreamEvent", event)
            kinds.add(event["type"])
        assert {"response.reasoning_text.delta", "response.function_call_arguments.done"} <= kinds
        [call] = [item for item in reply["output"] if item["type"] == "function_call"]
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "rain"}
        following = post(http, "/v1/responses", input=[*reply["output"], result], max_output_tokens=1)
        description.check("Response", following)
        listed = http.get(f"/v1/responses/{following['id']}/input_items").json()
        description.check("ResponseItemList", listed)


def test_responses_with_forms(hermes: str, description: Description) -> None:
    http = httpx.Client(base_url=hermes, timeout=30)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for fields in (
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}},
        {"text": {"format": {"type": "json_object"}}},
        {"tools": [TOOL], "tool_choice": "required"},
        {"tools": [TOOL], "tool_choice": {"type": "function", "name": "weather"}, "parallel_tool_calls": False},
    ):
        description.check("Response", post(http, "/v1/responses", input="hi", max_output_tokens=2, **fields))
        for event in events(http, "/v1/responses", input="hi", max_output_tokens=2, **fields):
            description.check("ResponseStreamEvent", event)
    http.close()


def test_responses(http: httpx.Client, description: Description) -> None:
    for body in (
        {"input": "hello", "max_output_tokens": 4},
        {"input": MESSAGES, "instructions": "be brief", "metadata": {"a": "b"}, "max_output_tokens": 9, **LOGPROBS},
        {"input": "hello", "stop": "lo"},
    ):
        description.check("Response", post(http, "/v1/responses", **body))
    for extra in ({}, LOGPROBS):
        for event in events(http, "/v1/responses", input="hello", max_output_tokens=4, **extra):
            description.check("ResponseStreamEvent", event)
    reply = post(http, "/v1/responses", input="hello", max_output_tokens=2)
    description.check("ResponseItemList", http.get(f"/v1/responses/{reply['id']}/input_items").json())


@pytest.fixture
def with_files(tmp_path: Path):
    with run_server(tmp_path / "model", state_folder=str(tmp_path / "state")) as server:
        yield server


def test_files_and_batches(with_files: RunningServer, description: Description) -> None:
    with httpx.Client(base_url=with_files.url) as http:
        line = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 1}}
        content = json.dumps(line).encode()
        file = http.post("/v1/files", files={"file": ("a.jsonl", content)}, data={"purpose": "batch"}).json()
        description.check("OpenAIFile", file)
        fields = {"endpoint": "/v1/completions", "completion_window": "24h", "input_file_id": file["id"]}
        batch = post(http, "/v1/batches", **fields)
        description.check("Batch", batch)
        while batch["status"] != "completed":
            assert batch["status"] in ("validating", "in_progress", "finalizing")
            batch = http.get(f"/v1/batches/{batch['id']}").json()
        description.check("Batch", batch)
        description.check("ListBatchesResponse", http.get("/v1/batches").json())
        description.check("ListFilesResponse", http.get("/v1/files").json())
        description.check("DeleteFileResponse", http.delete(f"/v1/files/{file['id']}").json())
