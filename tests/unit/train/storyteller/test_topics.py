"""Subjects are found by counting, and a retold story is about its new subject."""

from __future__ import annotations

import random

import pytest

from fastserve.train.storyteller.topics import (
    NounFinder,
    another_of_its_kind,
    mentions,
    plural,
    retell,
    sex_of,
    with_article,
)
from tests.unit.train.storyteller.toy import ANIMALS, tale


@pytest.fixture(scope="module")
def finder() -> NounFinder:
    filler = ["The road was long and the house was old. She had a lantern, and the lantern was bright."] * 6
    return NounFinder([*(tale(animal, friend) for animal in ANIMALS for friend in ANIMALS), *filler])


def test_subjects_are_the_animals(finder: NounFinder) -> None:
    assert set(finder.subjects(tale("lion", "mouse"))[:2]) == {"lion", "mouse"}


def test_a_noun_is_learnt_from_its_articles(finder: NounFinder) -> None:
    assert finder.subjects("The lantern fell. He took the lantern and ran to bring it home.") == ["lantern"]
    assert finder.phrase("lantern") == "a lantern"


def test_names_are_no_ordinary_words(finder: NounFinder) -> None:
    assert finder.names("So Anansi ran, and then Anansi sat. He saw The road and The road.") == ["Anansi"]


@pytest.mark.parametrize(
    ("noun", "many"), [("fox", "foxes"), ("mouse", "mice"), ("pony", "ponies"), ("monkey", "monkeys")]
)
def test_plural(noun: str, many: str) -> None:
    assert plural(noun) == many
    assert mentions(f"Two {many.capitalize()} came.", noun) == 1


def test_with_article() -> None:
    assert (with_article("owl"), with_article("fox")) == ("an owl", "a fox")


def test_retell_puts_forms_articles_and_capitals_right() -> None:
    text, title = retell("A fox met two Foxes. The fox's den, an old fox and foxglove.", "THE FOX", "fox", "eagle")
    assert text == "An eagle met two Eagles. The eagle's den, an old eagle and foxglove."
    assert title == "THE EAGLE"


def test_retell_of_a_name_leaves_the_word_alone() -> None:
    text, _ = retell("Rose picked a rose. Rose's mother smiled.", "", "Rose", "Lily")
    assert text == "Lily picked a rose. Lily's mother smiled."


def test_another_of_its_kind_is_new_and_allowed() -> None:
    chooser = random.Random(0)
    found = {another_of_its_kind("queen", "a queen and a fairy", chooser, frozenset({"mermaid"})) for _ in range(200)}
    assert "princess" in found
    assert not found & {"queen", "fairy", "mermaid", "fox", None}
    assert another_of_its_kind("democracy", "", chooser, frozenset()) is None


def test_sex_of() -> None:
    assert sex_of("She took her hat.") == "girl"
    assert sex_of("He took his hat.") == "boy"
    assert sex_of("He gave her his hat, and she thanked him and kissed her mother.") is None
