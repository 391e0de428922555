"""A server's answers to real questions (CMRC 2018 and FairytaleQA) against SQuAD's rules over transformers' logits.

The model is random, so that answers, windows and "no answer" come in all kinds; what is held equal is every decision.
The whole development set is the slow test, every tenth question where CI runs it; a smaller part runs every day.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import encoder_folders
from tests.e2e.conftest import FASTSERVE
from tests.server_process import ServerProcess, started
from tests.squad_rules import Reference

LONGEST, WINDOW, STRIDE = 30, 128, 48


def chinese_questions(folder: Path) -> list[tuple[str, str]]:
    paragraphs = [
        item
        for entry in json.loads((folder / "tasks" / "cmrc2018_dev.json").read_text())["data"]
        for item in entry["paragraphs"]
    ]
    return [(asked["question"], item["context"]) for item in paragraphs for asked in item["qas"]]


def fairy_tale_questions(folder: Path) -> list[tuple[str, str]]:
    def lines(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / "tasks" / name).read_text().splitlines()]

    stories = {item["story"]: item["sections"] for item in lines("fairytaleqa_train_stories.jsonl")}
    asked = [item for item in lines("fairytaleqa_train_questions.jsonl") if item["story"] in stories]
    return [
        (item["question"], " ".join(stories[item["story"]][number - 1] for number in item["sections"]))
        for item in asked
    ]


def all_questions(folder: Path) -> list[tuple[str, str]]:
    names = ("cmrc2018_dev.json", "fairytaleqa_train_stories.jsonl", "fairytaleqa_train_questions.jsonl")
    missing = [name for name in names if not (folder / "tasks" / name).is_file()]
    if missing:
        pytest.skip(f"the shared data lacks tasks/{', tasks/'.join(missing)}")
    return [*chinese_questions(folder), *fairy_tale_questions(folder)[:500]]


@pytest.fixture(scope="module")
def model(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT whose WordPiece vocabulary is of these texts."""
    folder = tmp_path_factory.mktemp("models") / "random-bert-qa"
    texts = {context for _, context in all_questions(shared_data)}
    options = dict(vocab_size=8000, hidden_size=32, intermediate_size=64, max_position_embeddings=512)
    encoder_folders.encoder(folder, "Bert", "ForQuestionAnswering", seed=3, **options)
    return encoder_folders.write_tokenizer(folder, sorted(texts)[::5], 8000)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[ServerProcess]:
    with started([*FASTSERVE, "serve", str(model), "--port", "0", "--num-threads", "1"]) as running:
        yield running


def check(server: ServerProcess, model: Path, questions: list[tuple[str, str]]) -> None:
    reference = Reference(model, "ForQuestionAnswering")
    num_windows = num_impossible = 0
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for number, (question, context) in enumerate(questions):
            rules = dict(max_answer_length=LONGEST, max_seq_length=WINDOW, doc_stride=STRIDE)
            may_be_impossible = number % 2 == 1
            expected = reference.answers(question, context, LONGEST, WINDOW, STRIDE, may_be_impossible)
            # The model is random: the threshold decides, once from each side, whether there is an answer.
            is_impossible = number % 4 == 1
            threshold = reference.difference + (-1e-3 if is_impossible else 1e-3)
            body = dict(question=question, context=context, no_answer_threshold=threshold, **rules)
            body["handle_impossible_answer"] = may_be_impossible
            reply = client.post("/v1/question-answering", json=body)
            assert reply.status_code == 200, reply.text
            [answer] = reply.json()["answers"]
            num_windows += reference.num_windows
            num_impossible += is_impossible
            expected = [item for item in expected if (item["answer"] == "") == is_impossible]
            # Two spans may be closer to each other than the rounding of float32.
            equals = [item for item in expected if item["score"] > expected[0]["score"] - 1e-6]
            places = [(item["start"], item["end"], item["answer"]) for item in equals]
            assert (answer["start"], answer["end"], answer["answer"]) in places, (question, answer, expected[:2])
            assert answer["score"] == pytest.approx(expected[0]["score"], abs=1e-4)
    assert num_windows > 2 * len(questions)
    assert num_impossible > len(questions) / 5


def test_a_part_of_the_questions(server: ServerProcess, model: Path, shared_data: Path) -> None:
    check(server, model, all_questions(shared_data)[::60])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_question(server: ServerProcess, model: Path, shared_data: Path) -> None:
    check(server, model, all_questions(shared_data)[:: 10 if "CI" in os.environ else 1])
