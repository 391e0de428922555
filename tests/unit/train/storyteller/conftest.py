"""A toy corpus and a recipe so small that a whole training run takes seconds."""

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

[tokenizer]
vocab_size = 320

[model]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
intermediate_size = 64
max_position_embeddings = 256

[pretrain]
batch_tokens = 512
checkpoint_every = 5
evaluate_every = 10

[[pretrain.phases]]
steps = 8
length = 64
mixture = { storybooks = 1, stories = 1.0 }

[[pretrain.phases]]
steps = 4
length = 128
mixture = { stories = 1.0 }

[pretrain.optimizer]
muon_learning_rate = 0.01
adamw_learning_rate = 0.01
warmup_steps = 2
decay_steps = 4

[tune]
batch_tokens = 512
length = 256
steps = 4
min_answer_tokens = 5
max_answer_tokens = 160
book_share = 0.2
requests_per_story = { storybooks = 2, stories = 1 }

[tune.optimizer]
muon_learning_rate = 0.01
adamw_learning_rate = 0.01
warmup_steps = 1
decay_steps = 2

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
