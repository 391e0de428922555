"""Small prepared corpora, one per kind of tokenizer, made once."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from fastserve.train.data.prepare import prepare
from fastserve.train.data.settings import PrepareSettings
from fastserve.train.recipe import build_section
from fastserve.train.settings import Recipe
from fastserve.train.tokenizer import TokenizerSettings, make_tokenizer_folder

_ANIMALS = ("fox", "bear", "wolf", "owl", "mouse", "crow", "goat", "duck")
_PLACES = ("river", "forest", "mountain", "village", "garden", "sea")


def tales(number: int, seed: int = 1) -> list[str]:
    """Little texts with few words, so that a small network learns something in a few steps."""
    chooser = random.Random(seed)
    return [
        " ".join(
            f"The {chooser.choice(_ANIMALS)} went to the {chooser.choice(_PLACES)}, to a {chooser.choice(_ANIMALS)}."
            for _ in range(chooser.randint(2, 8))
        )
        for _ in range(number)
    ]


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Prepared folders by kind of tokenizer (bpe, wordpiece, unigram)."""
    root = tmp_path_factory.mktemp("corpora")
    source = root / "tales.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in tales(300)), encoding="utf-8")
    settings = PrepareSettings(quality=False, near_duplicates=False, validation_share=0.1, workers=1)
    found = {}
    for kind, size in (("bpe", 320), ("wordpiece", 100), ("unigram", 160)):
        make_tokenizer_folder(tales(100), root / f"{kind}-tokenizer", TokenizerSettings(kind=kind, vocab_size=size))
        found[kind] = root / kind
        prepare([str(source)], found[kind], settings, root / f"{kind}-tokenizer")
    return found


LLAMA = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)


def recipe_values(corpus: Path, **sections: Any) -> dict[str, Any]:
    """A recipe for a tiny Llama in float32; keyword arguments are merged into its sections."""
    values: dict[str, Any] = {
        "name": "toy",
        "seed": 3,
        "model": {"type": "llama", "config": dict(LLAMA), "dtype": "float32"},
        "data": {"sources": {"tales": str(corpus)}, "length": 32, "validation_tokens": 512},
        "optimizer": {"learning_rate": 5e-3, "warmup_steps": 2},
        "train": {
            "batch_tokens": 256,
            "steps": 8,
            "precision": "float32",
            "evaluate_every": 100,
            "checkpoint_every": 4,
        },
        "watch": {"tensorboard": False, "report_every": 1},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return values


def make_recipe(corpus: Path, **sections: Any) -> Recipe:
    return build_section(Recipe, recipe_values(corpus, **sections), "")


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses_of(run: Path) -> dict[int, float]:
    """Step -> loss; where a step was done twice, the last counts."""
    return {line["step"]: line["loss"] for line in log_of(run) if "loss" in line}
