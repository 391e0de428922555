"""What rows of examples become, without a network: their forms, and the mistakes in them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastserve.core.errors import ConfigError
from fastserve.train.finetune.chat import Instruction, messages_of
from fastserve.train.finetune.examples import read_examples
from fastserve.train.finetune.labels import Classification, TokenClassification
from fastserve.train.finetune.settings import FinetuneSettings
from fastserve.train.finetune.spans import QuestionAnswering, answer_span, answers_of
from fastserve.train.network import open_tokenizer
from fastserve.train.objectives import IGNORED
from tests.folders import write_tokenizer

CONVERSATION = [{"role": "user", "content": "Where is the fox?"}, {"role": "assistant", "content": "In the forest."}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return open_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_answers_have_many_forms() -> None:
    context = "The fox lives in the forest."
    for answers in ("forest", ["forest"], {"text": "forest"}, {"text": "forest", "answer_start": 21}):
        row = {"context": context, "answers": answers}
        assert answers_of(row) == ["forest"] and answer_span(row) == (21, 27)
    twice = {"context": "forest, forest", "answers": {"text": ["forest"], "answer_start": [8]}}
    assert answer_span(twice) == (8, 14)
    for answers in (3, [3], {"texts": ["forest"]}):
        with pytest.raises(ConfigError, match="answers must be a text"):
            answers_of({"answers": answers})


def test_questions_without_an_answer_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    class Windows(QuestionAnswering):
        def _encoded(self, row: Any) -> Any:
            return type("Encoding", (dict,), {"encodings": [SimpleNamespace(sequence_ids=[1], offsets=[(0, 9)])]})()

    row = {"question": "Where?", "context": "In a wood", "answers": "wood"}
    with caplog.at_level(logging.WARNING):
        assert len(Windows(None, FinetuneSettings()).encode([row, {**row, "answers": "sea"}])) == 1
    assert "1 of 2 questions" in caplog.text


def test_conversations_have_many_forms() -> None:
    asked, answer = CONVERSATION
    for row in (
        {"messages": CONVERSATION},
        {"prompt": [asked], "completion": [answer]},
        {"prompt": asked["content"], "completion": [answer]},
        {"instruction": "Where is", "input": "the fox?", "output": answer["content"]},
    ):
        found = messages_of(row)
        assert [message["role"] for message in found] == ["user", "assistant"] and found[1] == answer
    for row, message in (
        ({"messages": [{"from": "human", "value": "x"}]}, "needs role .* rename the keys"),
        ({"messages": [asked, {"role": "assistant", "content": None}]}, "needs role .* and content"),
        ({"prompt": "x", "completion": None}, "a text or a list of messages"),
        ({"messages": []}, "a text or a list of messages"),
    ):
        with pytest.raises(ConfigError, match=message):
            messages_of(row)


def test_conversations_are_counted_and_templates_may_refuse(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    kind = Instruction(tokenizer, FinetuneSettings(max_length=40, packing=False))
    long = [{"role": "user", "content": "fox " * 100}, CONVERSATION[1]]
    with caplog.at_level(logging.WARNING):
        [item] = kind.encode([{"messages": CONVERSATION}, {"messages": long}])
    assert "In the forest." in tokenizer.decode([label for label in item["labels"] if label != IGNORED])
    assert "1 of 2 conversations" in caplog.text
    with pytest.raises(ConfigError, match="begins with an answer"):
        kind.encode([{"messages": CONVERSATION[1:]}])
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(ConfigError, match=r"refuses .*user, assistant.*no system role.*--chat-template"):
        kind.encode([{"messages": CONVERSATION}])


def test_tables_and_files_of_every_form(tmp_path: Path) -> None:
    def read(name: str, text: str, encoding: str = "utf-8") -> list[dict[str, Any]]:
        (tmp_path / name).write_text(text, encoding=encoding)
        return read_examples(tmp_path / name)

    assert read("a.csv", "text,label\nfox,x\n", "utf-8-sig") == [{"text": "fox", "label": "x"}]
    question = {"question": "Where?", "context": "Here.", "answers": ["Here"]}
    assert read("a.json", json.dumps({"data": [question]})) == [question]
    for name, text, message in (
        ("b.csv", "text,label\nfox,x\nbear\n", "line 3 has not the columns"),
        ("c.csv", "text,label\na fox, a bear,x\n", "line 2 has not the columns"),
        ("d.jsonl", '{"text": "fox"}\n["fox"]\n', "must be a JSON object"),
        ("e.json", '{"data": [{"paragraphs": [{"context": "x"}]}]}', "e.json cannot be read: an example has no 'qas'"),
        ("f.txt", "fox", "ends in .jsonl"),
    ):
        with pytest.raises(ConfigError, match=message):
            read(name, text)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        read_examples(tmp_path / "folder.csv")


def test_nulls_are_no_labels() -> None:
    with pytest.raises(ConfigError, match="null under 'label'"):
        Classification(None, FinetuneSettings()).configure(None, [{"label": "x"}, {"label": None}])
    words = TokenClassification(None, FinetuneSettings())
    for labels in (["O", None], "OO"):
        with pytest.raises(ConfigError, match="list without nulls under 'labels'"):
            words.configure(None, [{"tokens": ["a", "b"], "labels": labels}])
