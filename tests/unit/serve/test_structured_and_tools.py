"""Tools, thoughts and structured outputs over HTTP, with the fake engine that echoes its prompt."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from tests.folders import CHAT_TEMPLATE, write_tokenizer
from tests.unit.serve.server import run_server

CALL = '{"name": "weather", "arguments": {"city": "Paris"}}'
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
# The engine answers with the prompt, so what the user says is in the answer; max_tokens ends it before the next turn.
ASK = [{"role": "user", "content": f"<tool_call>\n{CALL}\n</tool_call>"}]
# A template that takes tools (and shows none, for the engine's context is short), calls as Hermes does, and thinks.
TEMPLATE = "{# tools <tool_call> </think> #}" + CHAT_TEMPLATE


@pytest.fixture(scope="module")
def hermes(tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp("hermes"), TEMPLATE)
    with run_server(folder) as running:
        yield running


@pytest.fixture
def http(hermes):
    with httpx.Client(base_url=hermes.url, timeout=20) as client:
        yield client


@pytest.fixture
def tool_client(hermes):
    with openai.OpenAI(base_url=f"{hermes.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


def test_calls_are_read_from_an_answer_and_streamed(tool_client):
    def ask(**more):
        return tool_client.chat.completions.create(model="fake", messages=ASK, tools=[TOOL], max_tokens=100, **more)

    message = ask().choices[0].message
    assert message.tool_calls[0].function.name == "weather"
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Paris"}
    assert message.tool_calls[0].id.startswith("call_") and message.tool_calls[0].type == "function"
    names, arguments, content = [], "", ""
    for chunk in ask(stream=True):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                assert call.index == 0
                names += [call.function.name] if call.function.name else []
                arguments += call.function.arguments or ""
    assert names == ["weather"] and json.loads(arguments) == {"city": "Paris"}
    assert content == (message.content or "")
    assert "<tool_call>" not in content


def test_without_tools_marks_are_text(tool_client):
    answer = tool_client.chat.completions.create(model="fake", messages=ASK, max_tokens=100)
    assert "<tool_call>" in answer.choices[0].message.content


def test_a_conversation_with_calls_and_results(client):
    messages = [
        {"role": "user", "content": "Paris?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    answer = client.chat.completions.create(model="fake", messages=messages, max_tokens=60)
    assert "rain" in answer.choices[0].message.content


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        ({"tool_choice": "required"}, "tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "not among"),
        ({"tools": [TOOL, TOOL]}, "same name"),
        ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "exclude"),
        ({"response_format": {"type": "json_schema"}}, "json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "not"),
        ({"guided_regex": "(?=a)"}, "look-ahead"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "one of"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "exactly one"),
        ({"structured_outputs": {"structural_tag": "a"}}, "structural_tag"),
        ({"guided_grammar": "start: ("}, "grammar"),
        ({"response_format": {"type": "json_object"}, "ignore_eos": True}, "ignore_eos"),
    ],
)
def test_what_cannot_be_done_is_refused(http, extra, word):
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, **extra}
    reply = http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 400, reply.text
    assert word in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    "extra",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "text"}},
        {"structured_outputs": {"choice": ["a", "b"]}},
        {"guided_json": {"type": "integer"}},
        {"guided_json": '{"type": "integer"}'},
        {"guided_choice": ["yes", "no"]},
        {"guided_grammar": 'root ::= "a"'},
        {"tools": [TOOL], "tool_choice": "required"},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
        {"tools": [TOOL], "tool_choice": "none"},
        {"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False},
    ],
)
def test_every_way_to_ask_is_taken(http, extra):
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, **extra}
    reply = http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("form", ["hermes", "llama3", "mistral", "json"])
def test_a_forced_call_can_be_written_and_is_read_back(form):
    """What the grammar of a forced call allows is what the parser reads: schema with references of its own included."""
    from fastserve.core.grammars import check
    from fastserve.serve.openai import ChatBody
    from fastserve.serve.tools import ChatStyle, ToolUse, describe_calls
    from tests.unit.engine.test_grammar import accepts, compiled

    other = {"type": "function", "function": {"name": "search", "parameters": {"$ref": "#/$defs/q", "$defs": {"q": {
        "type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]}}}}}  # fmt: skip
    body = ChatBody.model_validate(
        {"messages": [{"role": "user", "content": "x"}], "tools": [TOOL, other], "tool_choice": "required"}
    )
    style = ChatStyle.find("tools", form, "off")
    use = ToolUse.of(style, body.tools, body.tool_choice, is_single=False, has_form=False)
    wanted = use.structure()
    check(wanted)
    key = use.style.form.arguments
    first = f'{{"name": "weather", "{key}": {{"city":"Rome"}}}}'
    second = f'{{"name": "search", "{key}": {{"q":"x"}}}}'
    shape = use.style.form
    one = (lambda text: f"<tool_call>\n{text}\n</tool_call>") if form == "hermes" else (lambda text: text)
    text = shape.opening + one(first) + shape.separator + one(second) + shape.closing
    matcher = compiled(wanted)
    assert accepts(matcher, text)
    assert not accepts(matcher, text.replace('"q":"x"', '"q":3'))
    pieces = use.reader("").push(text, True)
    calls = [(call["name"], json.loads(call["arguments"])) for call in describe_calls(pieces)]
    assert calls == [("weather", {"city": "Rome"}), ("search", {"q": "x"})]


def test_a_template_without_tools_gets_them_in_the_system_message():
    from fastserve.serve.openai import Tool
    from fastserve.serve.tools import ChatStyle, ToolUse

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}]
    tools = [Tool.model_validate(TOOL)]
    use = ToolUse.of(ChatStyle.find("plain"), tools, None, is_single=False, has_form=False)
    told, tools = use.for_template(messages)
    assert tools is None and told[0]["role"] == "system" and told[1:] == messages[1:]
    assert told[0]["content"].startswith("Be brief.") and '"weather"' in told[0]["content"]
