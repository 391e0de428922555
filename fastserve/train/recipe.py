"""The recipe of one model: every number that shapes it, read from a TOML file.

A section of the file is a dataclass here and a key is a field, so a misspelt key or a value of the wrong type is an
error that names it. No stage reads a number from anywhere else; the exported card keeps the recipe as it was read.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from fastserve.core.errors import ConfigError


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
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no recipe at {path}; the built-in model's is configs/builtin.toml") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    recipe: Recipe = _build(Recipe, values, "")
    _check(recipe)
    return recipe


def _build(kind: Any, value: Any, where: str) -> Any:
    """Turn plain TOML values into `kind`: a dataclass, a list or dict of something, or a scalar."""
    origin, arguments = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build_section(kind, value, where)
    if origin is list and isinstance(value, list):
        return [_build(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _build(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if origin is None and type(value) is kind:
        return value
    raise ConfigError(f"recipe key {where or 'top level'}: expected {getattr(kind, '__name__', kind)}, got {value!r}")


def _build_section(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"recipe key {where}: expected a section with keys, got {value!r}")
    hints = get_type_hints(kind)
    fields = {item.name: item for item in dataclasses.fields(kind)}
    if unknown := sorted(set(value) - set(fields)):
        raise ConfigError(
            f"recipe section [{where or 'top level'}]: unknown key {unknown[0]!r}; known keys are {', '.join(fields)}"
        )
    required = {name for name, item in fields.items() if _is_required(item)}
    if missing := sorted(required - set(value)):
        raise ConfigError(f"recipe section [{where or 'top level'}]: key {missing[0]!r} is missing")
    prefix = f"{where}." if where else ""
    return kind(**{name: _build(hints[name], item, prefix + name) for name, item in value.items()})


def _is_required(item: dataclasses.Field[Any]) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


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
