"""/v1/responses with functions, thoughts and forms, by the `openai` client; the fake engine echoes the prompt."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from fastserve.serve.responses_body import messages_of
from tests.folders import CHAT_TEMPLATE, write_tokenizer
from tests.unit.serve.server import run_server

CALL = '{"name": "weather", "arguments": {"city": "Paris"}}'
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
# Takes tools and shows none, calls as Hermes does, thinks, and begins answers inside of the thoughts when told to.
TEMPLATE = (
    "{# tools <tool_call> </think> #}" + CHAT_TEMPLATE + "{% if add_generation_prompt and think %}<think>{% endif %}"
)
THINK = {"chat_template_kwargs": {"think": True}, "skip_special_tokens": True}


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp("hermes"), TEMPLATE)
    with (
        run_server(folder) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=20) as client,
    ):
        yield client


def ask_for_call(client: openai.OpenAI, **more: Any) -> Any:
    text = f"hm</think>Yes.\n<tool_call>\n{CALL}\n</tool_call>"
    return client.responses.create(
        model="fake", input=text, tools=[TOOL], max_output_tokens=120, extra_body=THINK, **more
    )


def without_ids(item: Any) -> dict[str, Any]:
    return {name: value for name, value in item.model_dump().items() if name not in ("id", "call_id")}


def test_thoughts_text_and_calls_are_items(client: openai.OpenAI):
    reply = ask_for_call(client)
    kinds = [item.type for item in reply.output]
    assert kinds[:3] == ["reasoning", "message", "function_call"]
    thought, message, call = reply.output[:3]
    assert thought.content[0].text.endswith("hm") and "</think>" not in thought.content[0].text
    assert message.content[0].text == "Yes."
    assert (call.name, json.loads(call.arguments), call.status) == ("weather", {"city": "Paris"}, "completed")
    assert reply.usage.output_tokens_details.reasoning_tokens == len(thought.content[0].text.encode())
    assert reply.tools[0].name == "weather" and reply.parallel_tool_calls


def test_streamed_items_equal_whole_ones(client: openai.OpenAI):
    whole = ask_for_call(client)
    events = list(ask_for_call(client, stream=True))
    final = events[-1].response
    assert list(map(without_ids, final.output)) == list(map(without_ids, whole.output))
    assert final.usage == whole.usage
    texts = dict.fromkeys(range(len(final.output)), "")
    for event in events:
        if event.type.endswith(".delta"):
            texts[event.output_index] += event.delta
    for index, item in enumerate(final.output):
        assert texts[index] == (item.arguments if item.type == "function_call" else item.content[0].text)
    opened = [event.item.id for event in events if event.type == "response.output_item.added"]
    closed = [event.item.id for event in events if event.type == "response.output_item.done"]
    assert opened == closed == [item.id for item in final.output]
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_logprobs_are_those_of_the_text(client: openai.OpenAI):
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    for streamed in (False, True):
        reply = ask_for_call(client, stream=streamed, **fields)
        part = (list(reply)[-1].response if streamed else reply).output[1].content[0]
        assert "".join(item.token for item in part.logprobs).endswith("Yes.")


def test_a_turn_with_the_result_of_a_call(client: openai.OpenAI):
    first = ask_for_call(client)
    [call] = [item for item in first.output if item.type == "function_call"]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    listed = client.responses.create(model="fake", input=[result], previous_response_id=first.id, max_output_tokens=1)
    by_hand = [{"role": "user", "content": "hi"}, *(item.model_dump() for item in first.output), result]
    again = client.responses.create(model="fake", input=by_hand, max_output_tokens=1)
    assert listed.usage.input_tokens > first.usage.input_tokens
    assert again.usage.output_tokens == 1
    [item] = client.responses.input_items.list(listed.id).data
    assert (item.type, item.call_id, item.output) == ("function_call_output", call.call_id, "rain")


def test_items_become_messages():
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    items: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": "c"},
        call,
        {**call, "call_id": "2"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "y"}]},
        call,
    ]
    user, assistant, first, second, last = messages_of(items)
    assert (user.content, first.content, second.content) == ("ab", "x", "y")
    assert (assistant.content, assistant.reasoning_content) == ("c", "hm")
    assert [item.id for item in assistant.tool_calls] == ["1", "2"]
    assert (first.role, first.tool_call_id, second.tool_call_id) == ("tool", "1", "2")
    assert last.reasoning_content is None and len(last.tool_calls) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOL], "tool_choice": "required"},
        {"tools": [TOOL], "tool_choice": {"type": "function", "name": "weather"}},
        {"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False},
        {"text": {"format": {"type": "json_schema", "name": "city", "schema": PARAMETERS, "strict": True}}},
        {"text": {"format": {"type": "json_object"}}},
    ],
)
def test_forms_are_taken_and_told_again(client: openai.OpenAI, fields: dict[str, Any]):
    reply = client.responses.create(model="fake", input="hi", max_output_tokens=3, **fields)
    told = reply.model_dump(by_alias=True)
    for name, value in fields.items():
        if name == "text":
            assert {**told["text"]["format"], **value["format"]} == told["text"]["format"]
        elif name != "tools":
            assert {**told, "tool_choice": told["tool_choice"]}[name] == value


def test_tools_and_a_form_exclude_each_other(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError, match="exclude"):
        client.responses.create(
            model="fake", input="hi", tools=[TOOL], text={"format": {"type": "json_object"}}, max_output_tokens=1
        )


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"text": {"verbosity": "low"}}, "verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}}, "not"),
        ({"tools": [{**TOOL, "parameters": {"half \ud800": 1}}]}, "tools"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"half \ud800": 1}}}}, "text"),
        ({"text": {"format": {"type": "text", "description": "\ud800"}}, "background": True}, "text"),
        ({"tools": [{**TOOL, "description": "\ud800"}], "tool_choice": "none"}, "tools"),
        ({"input": [{"type": "reasoning", "summary": ["\ud800"]}, {"role": "user", "content": "hi"}]}, "input"),
    ],
)
def test_what_forms_cannot_be(client: openai.OpenAI, fields: dict[str, Any], word: str):
    body = json.dumps({"input": "hi", "max_output_tokens": 1, **fields}).encode()
    with pytest.raises(openai.BadRequestError, match=word):
        client.post(
            "/responses", content=body, cast_to=object, options={"headers": {"Content-Type": "application/json"}}
        )
