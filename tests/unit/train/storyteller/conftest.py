"""A toy corpus and a recipe of its texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.train.storyteller.toy import ANIMALS, tale

RECIPE = """
name = "toy"
licence = "Apache-2.0"
seed = 7

[data]
held_out = "held_out.txt"
held_out_storybooks = 2
held_out_subjects = ["owl"]

[data.sources.storybooks]
file = "storybooks.jsonl"
kind = "storybooks"

[data.sources.stories]
file = "stories.txt"

[chats]
epochs = 2
min_answer_words = 4
max_answer_words = 120
book_share = 0.2
book_sources = ["stories"]
plots = 0
requests_per_story = { storybooks = 2, stories = 1 }

[generation]
max_new_tokens = 8
"""


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    """A folder with corpora/ as the recipe above names it."""
    corpora = tmp_path / "data" / "corpora"
    corpora.mkdir(parents=True)
    pairs = [(animal, friend) for animal in ANIMALS for friend in ANIMALS if animal != friend]
    tales = [tale(animal, friend) for animal, friend in pairs]
    (corpora / "stories.txt").write_text("\n<|endoftext|>\n".join(tales), encoding="utf-8")
    (corpora / "held_out.txt").write_text(tale("wolf", "goat") + "\n<|endoftext|>\n", encoding="utf-8")
    rows = [
        {
            "title": f"The {animal} and the {friend}",
            "text": f"Title {index}. {text}",
            "author": "A. Writer",
            "project": "P",
        }
        for index, ((animal, friend), text) in enumerate(zip(pairs, tales, strict=True))
    ]
    (corpora / "storybooks.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path / "data"


@pytest.fixture
def recipe_path(tmp_path: Path) -> Path:
    path = tmp_path / "toy.toml"
    path.write_text(RECIPE, encoding="utf-8")
    return path
