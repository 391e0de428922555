"""Requests are about their answers, held-out subjects are never asked for, and the encoding is the chat template's."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastserve.train.storyteller.chat import ChatSet
from fastserve.train.storyteller.corpus import read_corpus
from fastserve.train.storyteller.recipe import read_recipe
from fastserve.train.storyteller.tokenizer import CHAT_TEMPLATE, END_OF_TEXT, train_tokenizer
from fastserve.train.storyteller.topics import mentions


@pytest.fixture
def chat_set(recipe_path: Path, data_folder: Path) -> ChatSet:
    recipe = read_recipe(recipe_path)
    corpus = read_corpus(recipe.data, data_folder / "corpora", recipe.seed)
    tokenizer = train_tokenizer((document.text for document in corpus.training["stories"]), 320)
    return ChatSet(corpus.training, tokenizer, recipe.tune, frozenset({"owl"}))


def render(messages: list[tuple[str, str]], add_generation_prompt: bool = False) -> str:
    template = ImmutableSandboxedEnvironment().from_string(CHAT_TEMPLATE)
    as_dicts = [{"role": role, "content": content} for role, content in messages]
    return template.render(messages=as_dicts, bos_token=END_OF_TEXT, add_generation_prompt=add_generation_prompt)


def test_chat_template() -> None:
    messages = [("system", "Be kind."), ("user", " hello "), ("assistant", "Hi!"), ("user", "bye")]
    expected = "<|endoftext|><|system|>Be kind.<|end|><|user|>hello<|end|><|assistant|>Hi!<|end|><|user|>bye<|end|>"
    assert render(messages) == expected
    assert render(messages, add_generation_prompt=True) == expected + "<|assistant|>"


def test_chat_template_reads_parts() -> None:
    template = ImmutableSandboxedEnvironment().from_string(CHAT_TEMPLATE)
    content = [{"type": "text", "text": "hello"}, {"type": "image_url"}]
    assert template.render(messages=[{"role": "user", "content": content}], bos_token="") == "<|user|>hello<|end|>"


def test_encoding_is_what_the_template_renders(chat_set: ChatSet) -> None:
    messages = [
        ("system", "Be kind."),
        ("user", "Tell me a story."),
        ("assistant", "Once."),
        ("user", "More."),
        ("assistant", "Twice."),
    ]
    encoded = chat_set.encode(messages)
    tokenizer = chat_set.tokenizer
    assert encoded.tokens.tolist() == tokenizer.encode(render(messages)).ids
    learned = tokenizer.decode(encoded.tokens[encoded.is_answer].tolist(), skip_special_tokens=False)
    assert learned == "Once.<|end|>Twice.<|end|>"


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
