"""The real `openai` client against the API: what people's programs do."""

from __future__ import annotations

import threading

import httpx
import openai
import pytest

from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.core.config import EngineConfig
from fastserve.engine.client import EngineClient
from tests.unit.engine.fake_engine import MAX_MODEL_LEN
from tests.unit.serve.server import run_server

HELLO = [{"role": "user", "content": "hello"}]
# The fake engine echoes the prompt, which the test tokenizer's template makes of HELLO.
PROMPT = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
ECHO = "user\nhello\nassistant\n"


def num_prompt_tokens(http, messages=HELLO) -> int:
    return http.post("/tokenize", json={"messages": messages}).json()["count"]


def test_chat(client, http):
    count = num_prompt_tokens(http)
    answer = client.chat.completions.create(model="fake", messages=HELLO, max_completion_tokens=count)
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == ECHO
    assert choice.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (count, count)
    assert answer.usage.total_tokens == 2 * count
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.id.startswith("chatcmpl-")


def test_streamed_chat_equals_the_whole_one(client):
    whole = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=20)
    stream = client.chat.completions.create(
        model="fake", messages=HELLO, max_tokens=20, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content == ""
    assert 3 <= len(chunks) <= 21  # the role, then one per token unless this reader was slow
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert not any(chunk.choices[0].finish_reason for chunk in chunks[:-1])
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage.completion_tokens == 20
    assert {chunk.id for chunk in chunks} == {last.id}


def test_running_usage_is_in_every_chunk_when_asked_for(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = client.completions.create(model="fake", prompt="abc", max_tokens=9, stream=True, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in stream]
    assert counts[-2:] == [9, 9]
    assert counts[:-1] == sorted(set(counts))


def test_choices_are_interleaved_and_complete(client):
    texts = {0: "", 1: "", 2: ""}
    roles = []
    for chunk in client.chat.completions.create(model="fake", messages=HELLO, max_tokens=15, n=3, stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content
        roles += [choice.index] if choice.delta.role else []
    assert sorted(roles) == [0, 1, 2]
    assert len(set(texts.values())) == 1
    assert texts[0]


def test_completion_of_text_tokens_and_lists(client, http):
    ids = http.post("/tokenize", json={"prompt": "abc"}).json()["tokens"]
    for prompt in ("abc", ids):
        answer = client.completions.create(model="fake", prompt=prompt, max_tokens=6)
        assert answer.choices[0].text == "abcabc"
        assert answer.usage.prompt_tokens == 3
    for prompts in (["abc", "de"], [ids, http.post("/tokenize", json={"prompt": "de"}).json()["tokens"]]):
        answer = client.completions.create(model="fake", prompt=prompts, max_tokens=4, n=2)
        assert [choice.text for choice in answer.choices] == ["abca", "abca", "dede", "dede"]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 16)


def test_completion_streams(client):
    chunks = list(client.completions.create(model="fake", prompt=["ab", "cd"], max_tokens=4, stream=True))
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "abab", 1: "cdcd"}


def test_completions_make_16_tokens_and_chats_fill_the_context(client, http):
    assert client.completions.create(model="fake", prompt="x").usage.completion_tokens == 16
    answer = client.chat.completions.create(model="fake", messages=HELLO)
    assert answer.usage.completion_tokens == MAX_MODEL_LEN - num_prompt_tokens(http)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_cut_the_text_and_stop_the_engine(client, server, stream):
    answer = client.completions.create(
        model="fake", prompt="abcdef", max_tokens=250, stop=["ef", "zz"], stream=stream, extra_body={}
    )
    if stream:
        chunks = list(answer)
        assert "".join(chunk.choices[0].text for chunk in chunks) == "abcd"
        choice = chunks[-1].choices[0]
    else:
        [choice] = answer.choices
        assert choice.text == "abcd"
        assert answer.usage.completion_tokens == 6
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "ef")
    assert server.client.num_live == 0


def test_chat_logprobs(client):
    answer = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=6, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == 6
    assert content[0].token == "<|im_start|>"
    assert bytes(content[1].bytes).decode() == content[1].token == "u"
    for item in content:
        assert len(item.top_logprobs) == 3
        assert item.top_logprobs[0].token == item.token
        values = [top.logprob for top in item.top_logprobs]
        assert values == sorted(values, reverse=True)
    bare = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=2, logprobs=True)
    assert [item.top_logprobs for item in bare.choices[0].logprobs.content] == [[], []]


def test_streamed_logprobs_cover_every_token(client):
    whole = client.completions.create(model="fake", prompt="héllo", max_tokens=9, logprobs=2)
    tokens, offsets = [], []
    for chunk in client.completions.create(model="fake", prompt="héllo", max_tokens=9, logprobs=2, stream=True):
        tokens += chunk.choices[0].logprobs.tokens
        offsets += chunk.choices[0].logprobs.text_offset
    logprobs = whole.choices[0].logprobs
    assert (tokens, offsets) == (logprobs.tokens, logprobs.text_offset)
    assert len(tokens) == 9
    assert logprobs.token_logprobs == [-0.5] * 9
    assert [len(top) for top in logprobs.top_logprobs] == [2] * 9
    assert logprobs.tokens[:3] == ["h", "bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs.text_offset[:5] == [0, 1, 2, 2, 4]


def test_prompt_logprobs(client):
    answer = client.completions.create(model="fake", prompt="abc", max_tokens=1, extra_body={"prompt_logprobs": 1})
    first, *rest = answer.choices[0].prompt_logprobs
    assert first is None
    assert len(rest) == 2
    assert [next(iter(item.values()))["decoded_token"] for item in rest] == ["b", "c"]


def test_a_prompt_is_scored_once_and_shown_with_every_choice(client, http, server, monkeypatch):
    sent = []
    monkeypatch.setattr(
        server.client, "stream", lambda *given, real=server.client.stream: sent.extend(given) or real(*given)
    )
    body = {"prompt": ["abc", "de"], "n": 3, "max_tokens": 1}
    choices = http.post("/v1/completions", json={**body, "prompt_logprobs": 1}).json()["choices"]
    assert [request.sampling.prompt_logprobs for request in sent] == [1, None, None] * 2
    assert [len(choice["prompt_logprobs"]) for choice in choices] == [3, 3, 3, 2, 2, 2]
    best = http.post("/v1/completions", json={**body, "n": 1, "best_of": 3, "echo": True, "logprobs": 1}).json()[
        "choices"
    ]
    assert [choice["logprobs"]["tokens"] for choice in best] == [list("abca"), list("ded")]
    shown = ["", "", "", "", "", ""]
    with client.completions.create(model="fake", **body, echo=True, logprobs=1, stream=True) as chunks:
        for chunk in chunks:
            shown[chunk.choices[0].index] += "".join(chunk.choices[0].logprobs.tokens)
    assert shown == ["abca"] * 3 + ["ded"] * 3


def test_seeds_of_several_choices_stay_within_their_range(client):
    answer = client.completions.create(model="fake", prompt="abc", max_tokens=1, n=2, seed=2**64 - 1)
    assert len(answer.choices) == 2


def test_the_servers_seed_is_for_requests_without_one(tmp_path, monkeypatch):
    seeds, stream = [], EngineClient.stream

    def seen(self, *requests):
        seeds.append([request.sampling.seed for request in requests])
        return stream(self, *requests)

    monkeypatch.setattr(EngineClient, "stream", seen)
    for _ in range(2):
        with run_server(tmp_path, EngineConfig(seed=7)) as server:
            body = {"model": "fake", "prompt": ["a", "b"], "max_tokens": 1}
            assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 2


def test_long_prompts_are_tokenised_in_a_thread_and_too_many_not_at_all(http, monkeypatch):
    threads = []

    def encode(self, text, add_special_tokens=True):
        threads.append(threading.current_thread().name)
        return [5]

    monkeypatch.setattr(Tokenizer, "encode", encode)
    body = {"prompt": ["x" * 9000] * 3, "max_tokens": 1}
    assert http.post("/v1/completions", json=body).status_code == 200
    assert len(threads) == 3 and all(name.startswith("asyncio") for name in threads)
    many = http.post("/v1/completions", json={"prompt": ["x"] * 2048, "n": 128, "max_tokens": 1})
    assert many.status_code == 400 and "sequences" in many.text and len(threads) == 3


def test_no_character_is_broken_across_chunks(client):
    text = "naïve — 你好 🦊"
    chunks = client.completions.create(model="fake", prompt=text, max_tokens=60, stream=True)
    joined = "".join(chunk.choices[0].text for chunk in chunks)
    assert joined.startswith(text)
    assert "\ufffd" not in joined[: len(text)]


def test_message_forms(client):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    for messages in (
        [{"role": "user", "content": parts}],
        [{"role": "user", "content": "hello"}],
    ):
        answer = client.chat.completions.create(model="fake", messages=messages, max_tokens=30)
        assert answer.choices[0].message.content.startswith(ECHO)
    answer = client.chat.completions.create(
        model="fake", messages=[{"role": "developer", "content": "brief"}, *HELLO], max_tokens=30
    )
    assert answer.choices[0].message.content.startswith("system\nbrief\nuser\nhello")


def test_an_answer_can_be_sent_back_as_the_client_has_it(client):
    first = client.chat.completions.create(model="fake", messages=HELLO, max_tokens=3).choices[0].message
    again = client.chat.completions.create(
        model="fake", messages=[*HELLO, first.model_dump(), {"role": "user", "content": "more"}], max_tokens=3
    )
    assert again.usage.completion_tokens == 3


def test_extra_sampling_fields_are_taken(client):
    extra = {
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [5],
        "priority": 3,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "add_generation_prompt": False,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    answer = client.chat.completions.create(
        model="fake", messages=HELLO, max_tokens=20, seed=1, stop="lo", extra_body=extra, user="me"
    )
    assert answer.choices[0].message.content == "<|im_start|>user\nhello"


def test_models(client):
    [model] = client.models.list().data
    assert (model.id, model.max_model_len) == ("fake", MAX_MODEL_LEN)
    assert client.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/name")


def test_errors_are_the_clients_own_classes(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as invalid:
        client.chat.completions.create(model="fake", messages=HELLO, temperature=-1)
    assert invalid.value.param == "temperature"


def test_prompt_that_is_too_long_names_both_numbers(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="fake", prompt=[5] * 400, max_tokens=1)
    assert error.value.code == "context_length_exceeded"
    assert "400" in error.value.message
    assert str(MAX_MODEL_LEN - 1) in error.value.message
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="fake", prompt=[5] * 200, max_tokens=100)
    assert error.value.code == "context_length_exceeded"
    assert error.value.param == "max_tokens"
    full = client.completions.create(model="fake", prompt=[5] * (MAX_MODEL_LEN - 1), max_tokens=1)
    assert full.usage.completion_tokens == 1
