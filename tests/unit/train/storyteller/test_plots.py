"""The story grammar fills every slot, keeps to its subjects and never names an excluded one as its subject."""

from __future__ import annotations

import random

import pytest

from fastserve.train.storyteller.plots import StoryGrammar
from fastserve.train.storyteller.topics import mentions

NOUNS, NAMES = ["teapot", "owl"], {"girl": ["Anansi"]}


def test_stories_are_finished_and_differ() -> None:
    grammar, chooser = StoryGrammar(frozenset(), NOUNS, NAMES), random.Random(1)
    texts = [grammar.tell(chooser).text for _ in range(500)]
    assert not any(mark in text for text in texts for mark in "[]{}|")
    assert all(text.count('"') % 2 == 0 and text[-1] in '."!' for text in texts)
    assert all(50 < len(text.split()) < 300 for text in texts)
    assert len(set(texts)) == len(texts)


def test_the_topic_is_in_the_story() -> None:
    grammar, chooser = StoryGrammar(frozenset(), NOUNS, NAMES), random.Random(2)
    for _ in range(300):
        told = grammar.tell(chooser)
        for part in told.topic.split(" and "):
            assert part.split()[-1] in told.text, (told.topic, told.text)


@pytest.mark.parametrize("noun", ["owl", "fox", "king"])
def test_excluded_nouns_are_never_the_topic(noun: str) -> None:
    grammar, chooser = StoryGrammar(frozenset({noun}), NOUNS, NAMES), random.Random(3)
    assert not any(mentions(grammar.tell(chooser).topic, noun) for _ in range(1000))


def test_the_same_seed_tells_the_same_story() -> None:
    grammar = StoryGrammar(frozenset(), NOUNS, NAMES)
    assert grammar.tell(random.Random(4)) == grammar.tell(random.Random(4))
