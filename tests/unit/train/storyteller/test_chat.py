"""Requests are about their answers, held-out subjects are never asked for, and pieces of books come in their share."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.train.storyteller.chat import ChatSet
from fastserve.train.storyteller.corpus import read_corpus
from fastserve.train.storyteller.recipe import read_recipe
from fastserve.train.storyteller.topics import mentions


@pytest.fixture
def chat_set(recipe_path: Path, data_folder: Path) -> ChatSet:
    recipe = read_recipe(recipe_path)
    corpus = read_corpus(recipe.data, data_folder / "corpora", recipe.seed)
    return ChatSet(corpus.training, recipe.chats, frozenset({"owl"}))


def test_a_fifth_of_the_words_are_pieces_of_the_books(chat_set: ChatSet) -> None:
    books = chats = 0
    for row in chat_set.rows(seed=1):
        if "text" in row:
            assert row.keys() == {"text"} and 0 < len(row["text"].split()) <= 120
            books += len(row["text"].split())
        else:
            num_words = sum(len(message["content"].split()) for message in row["messages"])
            assert num_words <= 365
            chats += num_words
            assert row["messages"][-1]["role"] == "assistant" and row["messages"][-1]["content"]
    assert books / (books + chats) == pytest.approx(0.2, abs=0.02)


def test_stories_are_about_the_request(chat_set: ChatSet) -> None:
    checked = 0
    for messages in chat_set.conversations(seed=1):
        (_, request), (_, story) = messages[-2:]
        if request.startswith("Tell me a story about ") and "named" not in request and "called" not in request:
            for topic in request.removeprefix("Tell me a story about ").rstrip(".").split(" and "):
                assert mentions(story, topic.removeprefix("an ").removeprefix("a ")), (request, story)
                checked += 1
    assert checked > 5


def test_held_out_subjects_are_never_named(chat_set: ChatSet) -> None:
    for seed in range(5):
        for messages in chat_set.conversations(seed):
            assert not any(mentions(content, "owl") for role, content in messages if role == "user")


def test_epochs_are_made_afresh_and_repeat_with_the_seed(chat_set: ChatSet) -> None:
    assert list(chat_set.conversations(1)) == list(chat_set.conversations(1))
    assert list(chat_set.conversations(1)) != list(chat_set.conversations(2))
