"""Tool calls and thoughts in answers, cut into pieces of every size: what comes out does not depend on the cuts."""

from __future__ import annotations

import json

import pytest

from fastserve.serve.reasoning import Piece, ReasoningSplitter
from fastserve.serve.tool_parser import FORMS, ToolParser
from fastserve.serve.tools import AnswerReader, ChatStyle, describe_calls

NAMES = frozenset({"weather", "search"})
ARGUMENTS = '{"city": "Pa\\"ris}", "days": [1, {"a": null}]}'
CALL = f'{{"name": "weather", "arguments": {ARGUMENTS}}}'


def read(form: str, text: str, size: int, is_forced: bool = False, is_single: bool = False) -> tuple[str, list]:
    parser = ToolParser(FORMS[form], NAMES, is_forced, is_single)
    pieces: list[Piece] = []
    for start in range(0, len(text), size):
        pieces += parser.push(text[start : start + size], False)
    pieces += parser.push("", True)
    content = "".join(piece.text for piece in pieces if piece.kind == "content")
    return content, [(call["name"], call["arguments"]) for call in describe_calls(pieces)]


CASES = [
    ("hermes", f"<tool_call>\n{CALL}\n</tool_call>", "", [("weather", ARGUMENTS)]),
    ("hermes", f"Let me see.\n<tool_call>{CALL}</tool_call>\n<tool_call>\n{CALL}\n</tool_call>", "Let me see.", 2),
    ("hermes", "a < b <tool and <tool_calls> x", "a < b <tool and <tool_calls> x", 0),
    ("hermes", "just text \n", "just text \n", 0),
    ("hermes", f"{CALL} is no call", f"{CALL} is no call", 0),
    ("hermes", '<tool_call>{"name": "weather"}</tool_call> done', " done", [("weather", "")]),
    ("hermes", '<tool_call>\n{"name": "weather", "arguments": {"ci', "", [("weather", '{"ci')]),
    ("hermes", "<tool_call>oh no", "<tool_call>oh no", 0),
    ("llama3", CALL.replace("arguments", "parameters"), "", [("weather", ARGUMENTS)]),
    ("llama3", "<|python_tag|>" + CALL.replace("arguments", "parameters"), "", [("weather", ARGUMENTS)]),
    ("llama3", f"{CALL}; {CALL}", "", 2),
    ("llama3", '{"name": "nobody", "parameters": {}}', '{"name": "nobody", "parameters": {}}', 0),
    ("llama3", '{"answer": 42} <b>', '{"answer": 42} <b>', 0),
    ("mistral", f"[TOOL_CALLS] [{CALL}, {CALL}]", "", 2),
    ("mistral", f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}", "", [("weather", ARGUMENTS)]),
    (
        "mistral",
        f"[TOOL_CALLS]weather{ARGUMENTS}[TOOL_CALLS]search{{}}",
        "",
        [("weather", ARGUMENTS), ("search", "{}")],
    ),
    ("mistral", "[1, 2] and [TOOL", "[1, 2] and [TOOL", 0),
    ("json", f"[{CALL}, {CALL}]", "", 2),
    ("json", '{"arguments": {"a": 1}, "name": "search"}', "", [("search", '{"a": 1}')]),
    ("json", '{"name": "search", "arguments": "{\\"a\\": 1}"}', "", [("search", '{"a": 1}')]),
    ("json", "[1, 2, 3]", "[1, 2, 3]", 0),
    ("json", "  hello {x}", "  hello {x}", 0),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_calls_are_found_however_the_text_is_cut(
    form: str, text: str, content: str, calls: list | int, size: int
) -> None:
    found_content, found = read(form, text, size)
    assert found_content == content
    if isinstance(calls, int):
        assert found == [("weather", ARGUMENTS)] * calls
    else:
        assert found == calls


def test_arguments_come_as_they_are_made() -> None:
    parser = ToolParser(FORMS["hermes"], NAMES, False, False)
    assert parser.push('<tool_call>\n{"name": "weather"', False) == [Piece("call", "weather", 0)]
    begun = parser.push(', "arguments": {"city": "Pa', False)
    assert "".join(piece.text for piece in begun) == '{"city": "Pa'
    assert "".join(piece.text for piece in parser.push('ris"', False)) == 'ris"'


def test_one_call_at_most_when_only_one_is_wanted() -> None:
    assert read("json", f"[{CALL}, {CALL}]", 3, is_forced=True, is_single=True)[1] == [("weather", ARGUMENTS)]


def test_forced_calls_need_no_mark() -> None:
    assert read("mistral", f"[{CALL}]", 1, is_forced=True) == ("", [("weather", ARGUMENTS)])


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    ("inside", "text", "thought", "answer"),
    [
        (False, "<think>\nhm, <b> </thin k\n</think>\n\nYes </think> no", "hm, <b> </thin k", "Yes </think> no"),
        (True, "so\n</think>\nYes", "so", "Yes"),
        (False, "\nYes <think>no</think>", "", "\nYes <think>no</think>"),
        (False, "<thi", "", "<thi"),
        (True, "never ends ", "never ends ", ""),
        (False, "<think></think>ok", "", "ok"),
    ],
)
def test_thoughts_are_told_apart(size: int, inside: bool, text: str, thought: str, answer: str) -> None:
    splitter = ReasoningSplitter(inside)
    pieces = [
        piece for start in range(0, len(text), size) for piece in splitter.push(text[start : start + size], False)
    ]
    pieces += splitter.push("", True)
    assert "".join(piece.text for piece in pieces if piece.kind == "reasoning") == thought
    assert "".join(piece.text for piece in pieces if piece.kind == "content") == answer


def test_thoughts_come_before_calls() -> None:
    reader = AnswerReader(ReasoningSplitter(False), ToolParser(FORMS["hermes"], NAMES, False, False), False)
    pieces = reader.push(f"<think>I call <tool_call> now</think>\n<tool_call>{CALL}</tool_call>", True)
    assert pieces[0] == Piece("reasoning", "I call <tool_call> now")
    assert json.loads(describe_calls(pieces)[0]["arguments"])["days"] == [1, {"a": None}]
    assert reader.finish_reason("stop") == "tool_calls"
    assert reader.finish_reason("length") == "length"


@pytest.mark.parametrize(
    ("template", "form", "reasons"),
    [
        ("{% if tools %}<tool_call>{% endif %}", "hermes", False),
        ("{{ tools }} <|python_tag|>", "llama3", False),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral", False),
        ("{{ messages }} {{ content.split('</think>') }}", "json", True),
    ],
)
def test_the_form_is_found_from_the_template(template: str, form: str, reasons: bool) -> None:
    style = ChatStyle.find(template)
    assert (style.form, style.reasons) == (FORMS[form], reasons)
    assert ChatStyle.find(template, "llama3", "off") == ChatStyle(FORMS["llama3"], "tools" in template, False)
