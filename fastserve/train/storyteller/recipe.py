"""Where the texts of the built-in model come from and how its chats are made, read from a TOML file.

A section of the file is a dataclass here and a key is a field, so a misspelt key or a value of the wrong type is an
error that names it. The exported card keeps the recipe as it was read.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastserve.core.errors import ConfigError
from fastserve.train.recipe import build_section, read_toml


@dataclass(frozen=True, slots=True)
class Source:
    """A file of texts: `text` (documents end with a line `<|endoftext|>`, gzip or not) or `storybooks` (JSON lines)."""

    file: str
    kind: str = "text"
    licence: str = "public domain"
    keep_easiest_words: int = 0  # keep only the easiest documents up to this many words; 0 keeps all
    max_words: int = 0  # keep only documents of at most this many words; 0 keeps all

    @property
    def is_whole(self) -> bool:
        """Whether every document is kept: such sources define easy English."""
        return not self.keep_easiest_words and not self.max_words


@dataclass(frozen=True, slots=True)
class Data:
    """The texts, what is held out, and what is left out."""

    sources: dict[str, Source]
    held_out: str  # a text file that no stage trains on
    held_out_storybooks: int = 40  # storybooks kept back from training, chosen by the seed
    held_out_subjects: list[str] = field(default_factory=list)  # no request in training names one of these
    blocked_words: list[str] = field(default_factory=list)  # drop a document with a word that begins so


@dataclass(frozen=True, slots=True)
class Chats:
    """Chat tuning. `requests_per_story` names the sources of tales and how often a tale is asked for in an epoch."""

    requests_per_story: dict[str, int]
    epochs: int = 3  # each is made afresh
    min_answer_words: int = 30
    max_answer_words: int = 350
    max_words: int = 365  # of a whole conversation, longer ones are left out: about what a row of tuning holds
    book_share: float = 0.2  # share of the words that are plain pieces of the books, against forgetting
    book_sources: list[str] = field(default_factory=list)  # where those come from
    follow_up_share: float = 0.12  # share of tales followed by a second request
    retold_share: float = 0.7  # share of tales told of another animal, person or thing than in the book
    opening_share: float = 0.3  # share of the beginnings of long tales used in an epoch
    system_share: float = 0.08  # share of conversations opened by a system message
    plots: int = 0  # stories of the story grammar (plots.py) in an epoch
    small_talk_rounds: int = 2  # how often each question of small talk is asked in an epoch


@dataclass(frozen=True, slots=True)
class Generation:
    """Default sampling that the exported folder asks for."""

    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 400


@dataclass(frozen=True, slots=True)
class Recipe:
    name: str
    licence: str
    seed: int
    data: Data
    chats: Chats
    generation: Generation

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe; ConfigError names the key that is missing, unknown or of the wrong type."""
    recipe = build_section(Recipe, read_toml(path), "")
    for name, sources in (
        ("requests_per_story", recipe.chats.requests_per_story),
        ("book_sources", recipe.chats.book_sources),
    ):
        if unknown := sorted(set(sources) - set(recipe.data.sources)):
            raise ConfigError(f"recipe: chats.{name} names {unknown[0]!r}, which is not in data.sources")
    if recipe.chats.book_share and not recipe.chats.book_sources:
        raise ConfigError("recipe: chats.book_share needs chats.book_sources")
    if not 0 <= recipe.chats.book_share < 1:
        raise ConfigError("recipe: chats.book_share must be at least 0 and below 1")
    return recipe
