"""The recipe of one model: every number that shapes it, read from a TOML file.

A section of the file is a dataclass here and a key is a field, so a misspelt key or a value of the wrong type is an
error that names it. No stage reads a number from anywhere else; the exported card keeps the recipe as it was read.
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
        """Whether every document is kept: such sources define easy English, and the tokenizer learns from them."""
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
class TokenizerSection:
    vocab_size: int = 4096


@dataclass(frozen=True, slots=True)
class Model:
    """The shape, with the names of Hugging Face's LlamaConfig."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of pretraining with one window length and one mixture; weights are shares of the windows."""

    steps: int
    length: int
    mixture: dict[str, float]


@dataclass(frozen=True, slots=True)
class Optimizer:
    """Muon for matrices, AdamW for the rest; warm-up, plateau, then a linear decay to `final_share` of the rate."""

    muon_learning_rate: float
    adamw_learning_rate: float
    weight_decay: float = 0.1
    warmup_steps: int = 100
    decay_steps: int = 0
    final_share: float = 0.0
    clip_norm: float = 1.0


@dataclass(frozen=True, slots=True)
class Pretrain:
    batch_tokens: int
    phases: list[Phase]
    optimizer: Optimizer
    checkpoint_every: int = 200
    evaluate_every: int = 400


@dataclass(frozen=True, slots=True)
class Tune:
    """Chat tuning. `requests_per_story` names the sources of tales and how often a tale is asked for in an epoch."""

    batch_tokens: int
    length: int
    steps: int  # as many epochs as it takes; each makes its requests afresh
    max_answer_tokens: int
    min_answer_tokens: int
    book_share: float  # share of windows of plain pretraining text mixed in, against forgetting
    requests_per_story: dict[str, int]
    optimizer: Optimizer
    follow_up_share: float = 0.12  # share of tales followed by a second request
    retold_share: float = 0.7  # share of tales told of another animal, person or thing than in the book
    opening_share: float = 0.3  # share of the beginnings of long tales used in an epoch
    system_share: float = 0.08  # share of conversations opened by a system message
    plots: int = 0  # stories of the story grammar (plots.py) in an epoch
    small_talk_rounds: int = 2  # how often each question of small talk is asked in an epoch
    checkpoint_every: int = 200


@dataclass(frozen=True, slots=True)
class Generation:
    """Default sampling that the exported folder asks for."""

    temperature: float = 0.7
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    max_new_tokens: int = 400


@dataclass(frozen=True, slots=True)
class Recipe:
    name: str
    licence: str
    seed: int
    data: Data
    tokenizer: TokenizerSection
    model: Model
    pretrain: Pretrain
    tune: Tune
    generation: Generation

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe; ConfigError names the key that is missing, unknown or of the wrong type."""
    recipe = build_section(Recipe, read_toml(path), "")
    _check(recipe)
    return recipe


def _check(recipe: Recipe) -> None:
    """What the types cannot say."""
    model, pretrain = recipe.model, recipe.pretrain
    if model.hidden_size % model.num_attention_heads:
        raise ConfigError("recipe: model.hidden_size must be a multiple of model.num_attention_heads")
    if model.num_attention_heads % model.num_key_value_heads:
        raise ConfigError("recipe: model.num_attention_heads must be a multiple of model.num_key_value_heads")
    for index, phase in enumerate(pretrain.phases):
        if unknown := sorted(set(phase.mixture) - set(recipe.data.sources)):
            raise ConfigError(f"recipe: pretrain.phases[{index}] mixes {unknown[0]!r}, which is not in data.sources")
        if pretrain.batch_tokens % phase.length:
            raise ConfigError(
                f"recipe: pretrain.batch_tokens must be a multiple of phases[{index}].length ({phase.length})"
            )
    if recipe.tune.batch_tokens % recipe.tune.length:
        raise ConfigError("recipe: tune.batch_tokens must be a multiple of tune.length")
    longest = max([recipe.tune.length, *(phase.length for phase in pretrain.phases)])
    if longest > model.max_position_embeddings:
        raise ConfigError(f"recipe: windows of {longest} tokens exceed model.max_position_embeddings")
    if unknown := sorted(set(recipe.tune.requests_per_story) - set(recipe.data.sources)):
        raise ConfigError(f"recipe: tune.requests_per_story names {unknown[0]!r}, which is not in data.sources")
