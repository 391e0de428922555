"""Chat templates render as transformers renders them, and hostile or broken ones do no harm."""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path
from typing import Any

import pytest

from fastserve.checkpoint import chat_template
from fastserve.checkpoint.chat_template import ChatTemplate, find_template
from fastserve.core.errors import CheckpointError, RequestError
from tests.unit.checkpoint.test_tokenizer import open_folder

NAMES = [
    "alpaca", "amberchat", "chatml", "chatqa", "falcon-instruct", "gemma-it", "granite-3.0-instruct", "llama-2-chat",
    "llama-3-instruct", "mistral-instruct", "openchat-3.5", "phi-3-small", "phi-3", "qwen2.5-instruct", "saiga",
    "solar-instruct", "vicuna", "zephyr",
]  # fmt: skip
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": 'Tell me a story about <b>the sea</b> & "ships"'}],
    "turns": [
        {"role": "user", "content": "  hi  "},
        {"role": "assistant", "content": "Hello.\n"},
        {"role": "user", "content": "è vero?"},
    ],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
    "wrong order": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
}


def by_transformers(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template([messages], chat_template=source, **options)
    return str(rendered[0])


@pytest.mark.parametrize("chat", list(CHATS))
@pytest.mark.parametrize("name", NAMES)
def test_real_templates(shared_data: Path, name: str, chat: str) -> None:
    file = shared_data / "chat_templates" / f"{name}.jinja"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    source, messages = file.read_text(), CHATS[chat]
    template = ChatTemplate(source, SPECIAL)
    for add_generation_prompt in (True, False):
        for tools in (None, TOOLS):
            options = {"tools": tools, "add_generation_prompt": add_generation_prompt}
            try:
                expected = by_transformers(source, messages, **SPECIAL, **options)
            except Exception as error:  # the template's own refusal
                with pytest.raises(RequestError) as caught:
                    template.render(messages, **options)
                assert str(error) in str(caught.value)
            else:
                assert template.render(messages, **options) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
        "{% for m in messages %}\n  {% if true %}\n    {{ m.content | tojson }}\n  {% endif %}\n{% endfor %}",
        "{{ messages | tojson(indent=2) }}{{ tools }}{{ unknown }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ dict(a=1) | tojson }}{{ range(3) | list }}{{ bos_token * 3 }}{{ 2 ** 10 }}{{ '%s-%s' % (1, 2) }}",
        "{{ strftime_now('%Y') }}{{ messages[0]['content'].split('a') | last | trim }}",
    ],
)
def test_dialect(source: str) -> None:
    messages = CHATS["turns"]
    expected = by_transformers(source, messages, add_generation_prompt=True, **SPECIAL)
    assert ChatTemplate(source, SPECIAL).render(messages) == expected


def test_date() -> None:
    text = ChatTemplate("{{ strftime_now('%Y') }}", {}).render(CHATS["one"])
    assert abs(int(text) - datetime.datetime.now().year) <= 1


def test_own_words_of_a_refusal() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(RequestError, match="roles must alternate"):
        template.render(CHATS["one"])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__name__ }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{% for",
        "{{ messages[0].content + 3 }}",
        "{{ 'x' * 10**9 }}",
        "{{ 10**9 * 'x' }}",
        "{{ [0] * 10**9 }}",
        "{{ (9 ** 9) ** (9 ** 9) }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(1000) %}{{ 'x' * 1000000 }}{% endfor %}",
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ 1 }}",
        "{{ lipsum(9999) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'config.json' %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ 1 }}",
        "{% set ns = namespace(s='xx') %}{% for i in range(99) %}{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
        "{% set ns = namespace(s='xx') %}{% for i in range(99) %}{% set ns.s = ''.join([ns.s, ns.s]) %}{% endfor %}",
        "{% set ns = namespace(s='xx') %}{% for i in range(99) %}{% set ns.s = ns.s.replace('x', ns.s) %}{% endfor %}",
        "{% set ns = namespace(s='xx') %}{% for i in range(9) %}{% set ns.s = ns.s | replace('x', ns.s) %}{% endfor %}",
        "{{ 'a' | center(10**9) }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ 'a\\nb' | indent(10**9) }}",
    ],
)
def test_hostile_or_broken(source: str) -> None:
    began = time.thread_time()
    with pytest.raises(RequestError, match="chat template"):
        ChatTemplate(source, {}).render(CHATS["one"])
    assert time.thread_time() - began < 5


def test_loops_and_texts_that_are_counted_stay_what_they_are() -> None:
    source = (
        "{% for m in messages %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{{ m.role ~ '-' ~ 1 ~ none }}"
        "{% if loop.previtem is defined %}p{% endif %}{% else %}none{% endfor %}"
        "{{ ['a', 1, 'b'] | join('-') }}{{ '-'.join(['a', 'b']) }}{{ messages | map(attribute='role') | join(', ') }}"
        "{% for a, b in {'x': 1}.items() if b %}{{ a ~ b }}{% endfor %}{{ 'abc' | replace('b', 'x') | upper }}"
    )
    expected = by_transformers(source, CHATS["turns"], add_generation_prompt=True, **SPECIAL)
    assert ChatTemplate(source, SPECIAL).render(CHATS["turns"]) == expected


def test_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="characters"):
        ChatTemplate("x" * (chat_template.MAX_TEMPLATE_LENGTH + 1), {})
    monkeypatch.setattr(chat_template, "MAX_PROMPT_LENGTH", 100)
    with pytest.raises(RequestError, match="more than 100"):
        ChatTemplate("{{ messages[0].content }}", {}).render([{"role": "user", "content": "x" * 101}])


def test_messages_are_prepared_and_not_changed() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
    ]
    before = json.dumps(messages)
    source = (
        "{{ messages[0].content }}{{ messages[1].tool_calls[0].function.arguments.x }}{{ thinking }}{{ bos_token }}"
    )
    text = ChatTemplate(source, SPECIAL).render(messages, variables={"thinking": False, "messages": []})
    assert text == "ab1False<s>"
    assert json.dumps(messages) == before
    deep = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 100_000}}]}
    source_of_text = "{{ messages[0].tool_calls[0].function.arguments[:3] }}"
    assert ChatTemplate(source_of_text, {}).render([deep]) == "[[["
    with pytest.raises(RequestError, match="image_url"):
        ChatTemplate(source, {}).render([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])
    with pytest.raises(RequestError, match="at least one"):
        ChatTemplate(source, {}).render([])


@pytest.mark.parametrize("content", ["Once upon", "Once upon ", " the a the a"])
@pytest.mark.parametrize("form", ["{{ m.content }}", "{{ m.content | trim }}"])
def test_continue_final_message(content: str, form: str) -> None:
    source = "{% for m in messages %}<{{ m.role }}>" + form + "</>\n{% endfor %}"
    messages = [{"role": "user", "content": "the a"}, {"role": "assistant", "content": content}]
    template = ChatTemplate(source, SPECIAL)
    text = template.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert text == by_transformers(source, messages, continue_final_message=True)
    with pytest.raises(RequestError, match="exclude"):
        template.render(messages, continue_final_message=True)
    with pytest.raises(RequestError, match="does not show"):
        ChatTemplate("x", {}).render(messages, add_generation_prompt=False, continue_final_message=True)


def test_where_templates_are_found(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    assert find_template(folder) == ""
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert find_template(folder) == "json"
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert find_template(folder) == "plain"
    assert find_template(folder, has_tools=True) == "tools"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
    assert find_template(folder, has_tools=True) == "config"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert find_template(folder) == "file"
