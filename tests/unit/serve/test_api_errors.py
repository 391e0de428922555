"""Bad requests: each gets its status and OpenAI's error form, none gets 500, none reaches the engine."""

from __future__ import annotations

import json

import httpx
import pytest

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT = {"prompt": "hi", "max_tokens": 2}


def check_form(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", 1e999),
        ("temperature", 10**400),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("top_k", 2**40),
        ("min_p", 2),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("repetition_penalty", 0),
        ("n", 0),
        ("n", 100_000),
        ("n", 1.5),
        ("n", True),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 10**30),
        ("min_tokens", 3),
        ("seed", 2**70),
        ("seed", 10**400),
        ("top_k", 10**4000),
        ("num_beams", 0),
        ("stop", ["x"] * 100),
        ("stop", [""]),
        ("stop", [5]),
        ("stop", "\ud800"),
        ("\ud800", 1),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [10**6]),
        ("stop_token_ids", [2**40]),
        ("logit_bias", {"1": 200}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"99999": 1}),
        ("logit_bias", {"1": None}),
        ("prompt_logprobs", 21),
        ("prompt_logprobs", -1),
        ("priority", 2**40),
        ("stream", "yes"),
        ("model", 5),
        ("model", "\ud800"),
        ("logit_bias", {"\ud800": 1}),
        ("stream_options", {"include_usage": True}),
    ],
)
def test_fields_out_of_range(http, field, value):
    for path, body in (("/v1/completions", TEXT), (CHAT, HELLO)):
        content = json.dumps({**body, field: value})
        error = check_form(http.post(path, content=content, headers={"content-type": "application/json"}), 400)
        shown = field.encode("utf-8", "backslashreplace").decode()
        assert shown in (error["param"] or "") or shown in error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("modalities", ["audio"]),
        ("reasoning_effort", "high"),
        ("temprature", 1),
    ],
)
def test_what_is_not_supported_is_refused_by_name(http, field, value):
    for path, body in (("/v1/completions", TEXT), (CHAT, HELLO)):
        error = check_form(http.post(path, json={**body, field: value}), 400)
        assert error["param"] == field


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "user": "u", "metadata": {"a": "b"}},
        {"response_format": None, "logit_bias": None, "stop": None, "n": None, "stream": None, "whatever": None},
    ],
)
def test_fields_that_ask_for_nothing_are_fine(http, fields):
    assert http.post(CHAT, json={**HELLO, **fields}).status_code == 200


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        "hi",
        [{"content": "hi"}],
        [{"role": "robot", "content": "hi"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "assistant", "tool_calls": [{"id": "1"}]}],
        [{"role": "user", "content": "hi", "colour": "red"}],
        [{"role": "user", "content": "\ud800"}],
        [{"role": "\ud800", "content": "hi"}],
        [{"role": "user", "content": [{"type": "\ud800"}]}],
    ],
)
def test_messages_that_cannot_be_read(http, messages):
    content = json.dumps({"messages": messages})
    check_form(http.post(CHAT, content=content, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize("prompt", [None, 5, [], [[]], [1, "a"], [-1], [10**6], [2**40], "", ["a", ""], {"a": 1}])
def test_prompts_that_cannot_be_read(http, prompt):
    check_form(http.post("/v1/completions", json={"prompt": prompt}), 400)


def test_logprobs_limits(http):
    check_form(http.post(CHAT, json={**HELLO, "logprobs": True, "top_logprobs": 21}), 400)
    check_form(http.post(CHAT, json={**HELLO, "top_logprobs": 2}), 400)
    check_form(http.post("/v1/completions", json={**TEXT, "logprobs": 21}), 400)
    error = check_form(http.post("/v1/completions", json={**TEXT, "prompt_logprobs": 1, "stream": True}), 400)
    assert error["param"] == "prompt_logprobs"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"n": ' + b"9" * 9999,
    ],
)
def test_bodies_that_are_no_request(http, content):
    response = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    check_form(response, 400)


@pytest.mark.parametrize("name", ["%ED%A0%80", "a/b/c", "%00", "x" * 2000])
def test_odd_model_names(http, name):
    content = json.dumps({**TEXT, "model": name})
    response = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    check_form(response, 400 if len(name) > 1024 else 404)
    check_form(http.get(f"/v1/models/{name}"), 404)


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": True, "stream_options": {"\ud800": 1}},
        {"chat_template_kwargs": {str(number): 1 for number in range(40)}},
        {"chat_template_kwargs": [1]},
    ],
)
def test_odd_mappings(http, fields):
    content = json.dumps({**HELLO, **fields})
    check_form(http.post(CHAT, content=content, headers={"content-type": "application/json"}), 400)


def test_nul_and_control_characters_are_just_text(http):
    response = http.post("/v1/completions", json={"prompt": "a\x00b\x1b", "max_tokens": 4})
    assert response.json()["choices"][0]["text"] == "a\x00b\x1b"


def test_wrong_content_type_is_told(http):
    response = http.post(CHAT, content=json.dumps(HELLO), headers={"content-type": "text/plain"})
    assert "application/json" in check_form(response, 400)["message"]


def test_what_is_wrong_with_a_query_is_told(http):
    error = check_form(http.get("/v1/files?limit=abc"), 400)
    assert error["param"] == "limit" and "integer" in error["message"]


@pytest.mark.parametrize("body", [{"parameters": ["x"]}, {"parameters": {"config": {"a": 1}}}])
def test_loads_that_cannot_be_read(http, body):
    reply = http.post("/v2/repository/models/late/load", json=body)
    assert reply.status_code == 400 and "cannot be read" in reply.json()["error"]


@pytest.mark.parametrize(
    "fields", [{"num_beams": 4, "use_beam_search": False}, {"num_beams": 1, "use_beam_search": True}]
)
def test_a_search_and_none_exclude_each_other(http, fields):
    for path, body in (("/v1/completions", TEXT), (CHAT, HELLO)):
        assert "beam" in check_form(http.post(path, json={**body, **fields}), 400)["message"]


def test_unknown_paths_and_methods(http):
    check_form(http.get("/v1/nothing"), 404)
    check_form(http.get(CHAT), 405)
    check_form(http.post("/health"), 405)


def test_unknown_model(http):
    for path, body in (("/v1/completions", TEXT), (CHAT, HELLO), ("/tokenize", {"prompt": "a"})):
        error = check_form(http.post(path, json={**body, "model": "other"}), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_body_that_is_too_large(http):
    check_form(http.post("/v1/completions", json={"prompt": "x" * 300_000}), 413)

    def chunks():
        for _ in range(30):
            yield b"x" * 10_000

    check_form(http.post("/v1/completions", content=chunks()), 413)


def test_tokenize_and_detokenize(http):
    reply = http.post("/tokenize", json={"prompt": "hello", "return_token_strs": True}).json()
    assert reply["count"] == len(reply["tokens"])
    assert "".join(reply["token_strs"]) == "hello"
    assert http.post("/detokenize", json={"tokens": reply["tokens"]}).json() == {"prompt": "hello"}
    chat = http.post("/tokenize", json={"messages": HELLO["messages"]}).json()
    text = http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    for body in ({}, {"prompt": "a", "messages": HELLO["messages"]}):
        check_form(http.post("/tokenize", json=body), 400)
    for tokens in (None, [-1], ["a"], [2**40]):
        check_form(http.post("/detokenize", json={"tokens": tokens}), 400)


def test_small_endpoints(http):
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}
    from fastserve import __version__

    assert http.get("/version").json() == {"version": __version__}


def test_docs_need_nothing_from_outside(http):
    schema = http.get("/openapi.json").json()
    assert CHAT in schema["paths"]
    page = http.get("/docs").text
    assert CHAT in page
    assert "max_completion_tokens" in page
    assert "http://" not in page
    assert "https://" not in page
    assert "<script" not in page
