"""The sections of a pretraining recipe. What the types cannot say is checked here, before anything is loaded.

A recipe is a TOML file with these sections; `read_recipe` names the key that is missing, unknown or impossible.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastserve.core.errors import ConfigError
from fastserve.train.recipe import build_section, read_toml

OBJECTIVES = ("causal", "masked", "sentence-order", "span-corruption")
SCHEDULES = ("cosine", "wsd", "linear", "constant")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"recipe key {name}: must be one of {', '.join(allowed)}, not {value!r}")


def _at_least(name: str, value: float, low: float) -> None:
    if value < low:
        raise ConfigError(f"recipe key {name}: must be at least {low}, not {value}")


@dataclass(frozen=True, slots=True)
class ModelSection:
    """A new network of a type that transformers knows, or a folder to go on from.

    `config` has the keys of the type's own configuration class; vocabulary size and special ids are the tokenizer's.
    """

    type: str = ""
    folder: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"  # of the exported weights
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        if bool(self.type) == bool(self.folder):
            raise ConfigError("recipe section [model]: give either type (a new network) or folder (one to go on from)")
        _one_of("model.dtype", self.dtype, ("float32", "bfloat16"))


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of training with its own row length and mixture (source -> weight; empty: all alike by size)."""

    steps: int
    length: int
    mixture: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _at_least("data.phases: steps", self.steps, 1)
        _at_least("data.phases: length", self.length, 1)


@dataclass(frozen=True, slots=True)
class DataSection:
    """Token shards by name: folders that `fastserve data prepare --tokenizer` wrote (OUT/tokens).

    With `phases`, `length` and `train.steps` follow from them. The first source's tokenizer goes into the model folder.
    """

    sources: dict[str, str]
    length: int = 1024
    phases: list[Phase] = field(default_factory=list)
    mixture: dict[str, float] = field(default_factory=dict)
    validation_tokens: int = 200_000  # of each source, at every evaluation
    held_out: dict[str, str] = field(default_factory=dict)  # shards of texts of their own that are measured as well

    def __post_init__(self) -> None:
        _at_least("data.length", self.length, 1)
        if not self.sources:
            raise ConfigError("recipe section [data.sources]: name at least one folder of token shards")
        if twice := sorted(set(self.sources) & set(self.held_out)):
            raise ConfigError(f"recipe: {twice[0]!r} is in [data.sources] and in [data.held_out]; name them apart")
        for mixture in (self.mixture, *(phase.mixture for phase in self.phases)):
            if unknown := sorted(set(mixture) - set(self.sources)):
                raise ConfigError(f"recipe: a mixture names {unknown[0]!r}, which is not in [data.sources]")
            if mixture and (min(mixture.values()) < 0 or not sum(mixture.values())):
                raise ConfigError("recipe: the weights of a mixture must not be negative, nor all zero")


@dataclass(frozen=True, slots=True)
class ObjectiveSection:
    """What is learnt.

    causal: the next token. masked: tokens behind [MASK] (BERT, RoBERTa). sentence-order: that, and whether two segments
    are in their order (ALBERT). span-corruption: the spans that were taken out (T5).
    """

    kind: str = "causal"
    masked_share: float = 0.15
    mean_span: float = 3.0
    packing: bool = True  # rows of several documents, which do not attend to each other

    def __post_init__(self) -> None:
        _one_of("objective.kind", self.kind, OBJECTIVES)
        if not 0 < self.masked_share < 1:
            raise ConfigError("recipe key objective.masked_share: must lie between 0 and 1")
        _at_least("objective.mean_span", self.mean_span, 1)


@dataclass(frozen=True, slots=True)
class OptimizerSection:
    """AdamW for all, or Muon for the hidden matrices with AdamW for the rest; and the schedule of both rates."""

    kind: str = "adamw"
    learning_rate: float = 3e-4
    muon_learning_rate: float = 5e-3
    beta_1: float = 0.9
    beta_2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    schedule: str = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0  # wsd: steps of the decay at the end
    final_share: float = 0.1  # share of the peak rate at the end

    def __post_init__(self) -> None:
        _one_of("optimizer.kind", self.kind, ("adamw", "muon"))
        _one_of("optimizer.schedule", self.schedule, SCHEDULES)
        _at_least("optimizer.learning_rate", self.learning_rate, 0)
        if self.schedule == "wsd" and not self.decay_steps:
            raise ConfigError("recipe key optimizer.decay_steps: schedule wsd needs the steps of its decay")


@dataclass(frozen=True, slots=True)
class TrainSection:
    """How long, in what portions, how exact, and what is kept."""

    batch_tokens: int
    steps: int = 0
    micro_batch_tokens: int = 0  # per process and pass; 0: the whole share of the batch
    precision: str = "bfloat16"
    gradient_checkpointing: bool = False
    compile: bool = False
    ema_decay: float = 0.0  # 0: none; evaluation and export take the average
    evaluate_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    spike_factor: float = 3.0  # a loss so many times above the running mean counts as divergence; 0: only NaN does
    max_rollbacks: int = 5

    def __post_init__(self) -> None:
        _one_of("train.precision", self.precision, ("float32", "bfloat16", "float16"))
        _at_least("train.steps", self.steps, 0)
        for name in ("batch_tokens", "evaluate_every", "checkpoint_every", "keep_checkpoints"):
            _at_least(f"train.{name}", getattr(self, name), 1)
        if not 0 <= self.ema_decay < 1:
            raise ConfigError("recipe key train.ema_decay: must be at least 0 and below 1")


@dataclass(frozen=True, slots=True)
class ParallelSection:
    """The mesh: stages of layers (pipeline), copies of them (data), shards (FSDP2), and parts of matrices (tensor)."""

    pipeline: int = 1
    data: int = 1
    shard: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        for name in ("pipeline", "data", "shard", "tensor"):
            _at_least(f"parallel.{name}", getattr(self, name), 1)
        if self.tensor > 1 and self.data > 1:
            raise ConfigError("recipe section [parallel]: combine tensor with shard, not with data (copies)")
        if self.pipeline > 1 and self.shard * self.tensor > 1:
            raise ConfigError("recipe section [parallel]: combine pipeline with data (copies), not with shard, tensor")

    @property
    def num_processes(self) -> int:
        return self.pipeline * self.data * self.shard * self.tensor


@dataclass(frozen=True, slots=True)
class WatchSection:
    """What tells how the run goes, besides log.jsonl."""

    tensorboard: bool = True
    wandb_project: str = ""
    report_every: int = 10
    samples: list[str] = field(default_factory=list)  # prompts that are continued at every evaluation
    sample_tokens: int = 60

    def __post_init__(self) -> None:
        _at_least("watch.report_every", self.report_every, 1)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One pretraining run. `search` is read by `fastserve tune` alone."""

    name: str
    model: ModelSection
    data: DataSection
    optimizer: OptimizerSection
    train: TrainSection
    objective: ObjectiveSection = ObjectiveSection()
    parallel: ParallelSection = ParallelSection()
    watch: WatchSection = WatchSection()
    seed: int = 0
    search: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.train.steps) == bool(self.data.phases):
            raise ConfigError("recipe: give either train.steps or [[data.phases]]")
        if self.parallel.pipeline > 1:
            self._check_pipeline()
        ranks = self.parallel.data * self.parallel.shard
        for phase in self.phases:
            if self.train.batch_tokens % (phase.length * ranks):
                raise ConfigError(
                    f"recipe key train.batch_tokens: {self.train.batch_tokens} must be a multiple of the row length "
                    f"{phase.length} times the {ranks} processes that share a batch"
                )

    @property
    def phases(self) -> list[Phase]:
        return self.data.phases or [Phase(self.train.steps, self.data.length, self.data.mixture)]

    @property
    def num_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def share_rows(self, length: int) -> int:
        """The rows of `length` tokens that one process takes of a batch."""
        return self.train.batch_tokens // length // (self.parallel.data * self.parallel.shard)

    def pass_rows(self, length: int) -> int:
        """The rows of one pass: as micro_batch_tokens says, else a process's whole share of the batch.

        A pipeline divides the share into four passes for each stage, so that stages seldom wait for each other.
        """
        share = self.share_rows(length)
        if self.train.micro_batch_tokens:
            return min(share, max(1, self.train.micro_batch_tokens // length))
        return share if self.parallel.pipeline == 1 else math.ceil(share / (4 * self.parallel.pipeline))

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def _check_pipeline(self) -> None:
        if self.objective.kind not in ("causal", "masked"):
            raise ConfigError(
                f"recipe key parallel.pipeline: the objective {self.objective.kind!r} is not learnt in stages; use "
                "data or shard"
            )
        if self.watch.samples:
            raise ConfigError(
                "recipe key watch.samples: no process of a pipeline can continue a prompt; leave samples out, and ask "
                "the exported folder"
            )


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe; paths in it are relative to the working folder."""
    return build_section(Recipe, read_toml(path), "")
