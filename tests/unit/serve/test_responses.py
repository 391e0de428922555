"""/v1/responses by the `openai` client, and what completions gained: best_of, echo, suffix."""

from __future__ import annotations

import time

import httpx
import openai
import pytest

from fastserve.checkpoint.folder import ModelFolder
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.core.errors import RequestError
from fastserve.core.request import Request, TokenLogprobs
from fastserve.core.sampling_params import SamplingParams
from fastserve.serve.completions import best_of, fill_in_prompt
from fastserve.serve.errors import ApiError
from fastserve.serve.generation import Answer, Choice
from fastserve.serve.response_store import ResponseStore, StoredResponse, page
from tests.folders import write_tokenizer

# The fake engine echoes the prompt, which the test tokenizer's template makes of one user's turn.
ECHO = "user\nhello\nassistant\n"
LOGPROBS = ["message.output_text.logprobs"]


def test_a_response_and_the_next_turn(client: openai.OpenAI):
    first = client.responses.create(model="fake", input="hello", max_output_tokens=28, metadata={"a": "b"})
    assert (first.status, first.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert first.output_text.startswith(ECHO[:10])
    assert first.usage.output_tokens == 28
    assert first.metadata == {"a": "b"}
    second = client.responses.create(
        model="fake", input=[{"role": "user", "content": "more"}], previous_response_id=first.id, instructions="brief"
    )
    assert second.output_text.startswith(f"system\nbrief\nuser\nhello\nassistant\n{first.output_text}\nuser\nmore")
    assert client.responses.retrieve(second.id).output_text == second.output_text
    [item] = client.responses.input_items.list(second.id).data
    assert item.content[0].text == "more"
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.NotFoundError) as error:
        client.responses.create(model="fake", input="x", previous_response_id=first.id)
    assert error.value.param == "previous_response_id"


def test_a_stop_string_completes_a_response(client: openai.OpenAI):
    reply = client.responses.create(model="fake", input="hello", extra_body={"stop": "lo"})
    assert (reply.status, reply.output_text) == ("completed", "user\nhel")
    unstored = client.responses.create(model="fake", input="hello", max_output_tokens=1, store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unstored.id)


def test_a_streamed_response_equals_the_whole_one(client: openai.OpenAI):
    fields = dict(model="fake", input="hello", max_output_tokens=20, include=LOGPROBS, top_logprobs=2)
    whole = client.responses.create(**fields)
    events = list(client.responses.create(**fields, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = events[4:-4]
    assert "".join(event.delta for event in deltas) == whole.output_text == events[-4].text
    assert sum(len(event.logprobs) for event in deltas) == 20
    part = events[-1].response.output[0].content[0]
    assert len(part.logprobs) == 20
    assert [len(item.top_logprobs) for item in part.logprobs] == [2] * 20
    with client.responses.stream(model="fake", input="hello", extra_body={"stop": "lo"}) as stream:
        assert stream.get_final_response().output_text == "user\nhel"


def test_background_responses(client: openai.OpenAI, server):
    reply = client.responses.create(model="fake", input="hello", background=True, max_output_tokens=5)
    assert reply.status in ("queued", "in_progress")
    deadline = time.monotonic() + 60
    while (reply := client.responses.retrieve(reply.id)).status in ("queued", "in_progress"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert (reply.status, reply.usage.output_tokens) == ("incomplete", 5)
    assert client.responses.cancel(reply.id).status == "incomplete"
    foreground = client.responses.create(model="fake", input="hello", max_output_tokens=1)
    with pytest.raises(openai.BadRequestError, match="background"):
        client.responses.cancel(foreground.id)
    assert server.client.num_live == 0


def test_a_background_response_that_cannot_be_kept_holds_nothing(server, http, monkeypatch):
    def put(stored: StoredResponse) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(server.api._responses.store, "put", put)
    assert http.post("/v1/responses", json={"input": "hello", "background": True}).status_code == 500
    assert server.client.num_live == 0 and server.api.generator._admission.num_tokens == 0


def test_a_background_response_can_be_cancelled(tmp_path, monkeypatch):
    from tests.unit.serve.server import run_server

    monkeypatch.setenv("FAKE_ENGINE_STEP", "0.05")
    with run_server(tmp_path) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        reply = client.responses.create(model="fake", input="hello", background=True)
        assert client.responses.cancel(reply.id).status == "cancelled"
        assert client.responses.retrieve(reply.id).status == "cancelled"
        gone = client.responses.create(model="fake", input="hello", background=True)
        client.responses.delete(gone.id)
        deadline = time.monotonic() + 60
        while server.client.num_live:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(gone.id)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input", None),
        ("input", []),
        ("input", [{"type": []}]),
        ("input", [{"type": "item_reference", "id": "x"}]),
        ("input", [{"type": "reasoning"}]),
        ("input", [{"type": "function_call", "call_id": "1"}]),
        ("input", [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}] * 1025),
        ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": "http://x/"}]}]),
        ("n", 2),
        ("max_tokens", 5),
        ("max_output_tokens", 0),
        ("include", ["reasoning.encrypted_content"]),
        ("top_logprobs", 2),
        ("tools", [{"type": "web_search"}]),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "file_search"}),
        ("text", {"format": {"type": "json_schema"}}),
        ("response_format", {"type": "json_object"}),
        ("truncation", "auto"),
        ("reasoning", {"effort": "high"}),
        ("metadata", {"a": "b" * 513}),
        ("metadata", {str(number): "b" for number in range(17)}),
        ("conversation", "conv_1"),
        ("whatever", 1),
    ],
)
def test_what_a_response_cannot_be(http: httpx.Client, field, value):
    response = http.post("/v1/responses", json={"input": "x", field: value})
    assert response.status_code == 400
    error = response.json()["error"]
    assert field in (error["param"] or "") or field in error["message"]


def test_streams_of_responses_end_with_an_error_in_their_own_form(http: httpx.Client):
    body = {"input": "hello", "stream": True, "timeout": 0.001, "max_output_tokens": 200}
    text = http.post("/v1/responses", json=body).text
    assert "event: error" in text
    assert "deadline_exceeded" in text
    assert "event: response.failed" in text
    assert "[DONE]" not in text


def stored(number: int, size: int = 0, tenant: str = "") -> StoredResponse:
    return StoredResponse(tenant, {"id": f"r{number}", "text": "x" * size}, [])


def test_the_store_is_bounded_and_private():
    store = ResponseStore(10 * 2110)
    for number in range(30):
        store.put(stored(number))
    assert len(store) == 10
    assert store.num_bytes <= 10 * 2110
    assert store.get("r29", "").body["id"] == "r29"
    for response_id, tenant in (("r0", ""), ("r29", "other")):
        with pytest.raises(ApiError):
            store.get(response_id, tenant)
    store.put(stored(99, size=100_000))
    assert len(store) == 10
    for number in range(20, 30):
        store.delete(f"r{number}", "")
    assert (len(store), store.num_bytes) == (0, 0)


def test_pages():
    items = [{"id": str(number)} for number in range(5)]
    assert page(items, None, 2) == {
        "object": "list", "data": items[:2], "first_id": "0", "last_id": "1", "has_more": True,
    }  # fmt: skip
    assert page(items, "3", 20)["data"] == items[4:]
    assert page([], None, 1) == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    for after, limit in (("9", 1), (None, 0), (None, 101)):
        with pytest.raises(ApiError):
            page(items, after, limit)


def answer(prompt_index: int, *logprobs: float) -> Answer:
    request = Request("r", [1], SamplingParams(), 0.0)
    choice = Choice(0, prompt_index, request, None)
    return Answer(choice, str(logprobs), [TokenLogprobs([1], [value], 1) for value in logprobs])


def test_best_of_goes_by_the_mean():
    answers = [answer(0, -1, -1), answer(0, -0.5), answer(0, -0.2, -0.2, -0.2), answer(1, -9), answer(1, -8, -8)]
    assert [item.text for item in best_of(answers, 2)] == ["(-0.2, -0.2, -0.2)", "(-0.5,)", "(-8, -8)", "(-9,)"]
    assert [item.choice.index for item in best_of(answers, 1)] == [0, 1]


def test_best_of_over_http(client: openai.OpenAI, http: httpx.Client):
    reply = client.completions.create(model="fake", prompt=["ab", "cd"], max_tokens=2, n=2, best_of=4)
    assert [(choice.index, choice.text, choice.logprobs) for choice in reply.choices] == [
        (0, "ab", None), (1, "ab", None), (2, "cd", None), (3, "cd", None),
    ]  # fmt: skip
    assert reply.usage.completion_tokens == 2 * 4 * 2
    for fields in ({"n": 3, "best_of": 2}, {"best_of": 2, "stream": True}, {"best_of": 1000}):
        assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, **fields}).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_echo(client: openai.OpenAI, stream: bool):
    reply = client.completions.create(model="fake", prompt="abc", max_tokens=2, echo=True, logprobs=1, stream=stream)
    choices = [chunk.choices[0] for chunk in reply] if stream else reply.choices
    assert "".join(choice.text for choice in choices) == "abcab"
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    values = [value for choice in choices for value in choice.logprobs.token_logprobs]
    offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
    assert (tokens, offsets) == (list("abcab"), [0, 1, 2, 3, 4])
    assert values == [None, -0.5, -0.5, -0.5, -0.5]


def test_echo_alone(client: openai.OpenAI, http: httpx.Client):
    reply = client.completions.create(model="fake", prompt="abc", max_tokens=0, echo=True, logprobs=1)
    [choice] = reply.choices
    assert (choice.text, choice.finish_reason, reply.usage.completion_tokens) == ("abc", "length", 0)
    assert choice.logprobs.tokens == ["a", "b", "c"]
    for fields in ({}, {"echo": True, "stream": True}, {"echo": True, "max_tokens": -5}):
        assert http.post("/v1/completions", json={"prompt": "a", "max_tokens": 0, **fields}).status_code == 400


def test_suffix(tmp_path, http: httpx.Client):
    refused = http.post("/v1/completions", json={"prompt": "a", "suffix": "b"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "suffix")
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    tokenizer = Tokenizer.load(ModelFolder.open(str(tmp_path)))
    tokenizer._backend.add_special_tokens(["<fim_prefix>", "<fim_suffix>", "<fim_middle>"])
    ids = fill_in_prompt(tokenizer, "ab", "cd")
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert text.endswith("<fim_prefix>ab<fim_suffix>cd<fim_middle>")
    with pytest.raises(RequestError, match="token ids"):
        fill_in_prompt(tokenizer, [1], "cd")
    for before, after in (("\ud800", "cd"), ("ab", "\ud800")):
        with pytest.raises(RequestError, match="Unicode"):
            fill_in_prompt(tokenizer, before, after)
