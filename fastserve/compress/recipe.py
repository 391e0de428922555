"""What a recipe says: calibration, evaluation, and the steps in order. Read from TOML or made in Python.

    [calibration]
    text = "stories.txt"

    [[steps]]
    do = "quantize"
    method = "gptq"
    bits = 4

A section is a class here and a key is a field, so a misspelt key or a value of the wrong type is an error that names
it. Nothing else in this room reads settings.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from fastserve.core.errors import ConfigError

Count = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(gt=0, lt=1)]
METHODS = ("rtn", "gptq", "awq", "kmeans", "smoothquant")
_CALIBRATED = ("gptq", "awq", "smoothquant")


class Calibration(Struct, frozen=True, forbid_unknown_fields=True):
    """Inputs on which methods look at activations.

    Attributes:
        text: a plain text file, or "generated": the model's own samples; "" when no step needs any.
        samples, length: how many windows of how many tokens.
        batch_size: windows in one pass.
        seed: of where windows begin, and of what is generated.
    """

    text: str = ""
    samples: Count = 128
    length: Count = 512
    batch_size: Count = 8
    seed: int = 0


class Evaluation(Struct, frozen=True, forbid_unknown_fields=True):
    """Text on which the report compares the result with the original.

    Attributes:
        text: a plain text file that was not calibrated on; "" leaves the comparison out.
        tokens, length: how many tokens of it, in windows of which length.
        speed: also time prefill and decoding of both as FastServe serves them.
        task, examples: also score both on examples of a task, as `fastserve eval --task` does.
    """

    text: str = ""
    tokens: Count = 8192
    length: Count = 512
    speed: bool = False
    task: str = ""
    examples: str = ""


class Quantize(Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag="quantize"):
    """Weights (and activations) in fewer bits.

    Attributes:
        method: rtn (round to nearest), gptq, awq, kmeans (codebooks), smoothquant.
        kind: int, codebook (3 or 4 bits; kmeans has no other) or float (8 bits, e4m3).
        bits: 2 to 8.
        group_size: weights that share a scale; 0: a row, -1: a tensor. By default 128 for integers under 8 bits.
        symmetric: no zero points.
        activations: none, dynamic (8 bits per token), or static (8 bits per tensor, ranges from calibration).
        observer: how static ranges are found: minmax, percentile, mse or entropy.
        search: try narrower ranges than the widest, and take the best.
        head: "" leaves the output projection, int8 rounds it (the embedding, where they are tied).
        budget: bits per weight to reach on average by giving each layer 8 or `bits`; 0: all have `bits`.
        kv_cache: "float8" also stores a scale for the keys and one for the values of every layer, by which programs
            that keep them in 8 bits may round them; "": none.
        smoothing: how much of the inputs' spread smoothquant moves into the weights.
        ignore: modules to leave, by name or as "re:" and a pattern.
    """

    method: Literal["rtn", "gptq", "awq", "kmeans", "smoothquant"] = "rtn"
    kind: Literal["int", "codebook", "float"] = "int"
    bits: Annotated[int, Meta(ge=2, le=8)] = 4
    group_size: Annotated[int, Meta(ge=-1)] | None = None
    symmetric: bool = True
    activations: Literal["none", "dynamic", "static"] = "none"
    observer: Literal["minmax", "percentile", "mse", "entropy"] = "minmax"
    search: bool = True
    head: Literal["", "int8"] = ""
    budget: Annotated[float, Meta(ge=0, le=8)] = 0.0
    kv_cache: Literal["", "float8"] = ""
    smoothing: Annotated[float, Meta(ge=0, le=1)] = 0.5
    ignore: tuple[str, ...] = ()

    @property
    def needs_text(self) -> bool:
        is_calibrated = self.method in _CALIBRATED or self.activations == "static"
        return is_calibrated or self.budget > 0 or bool(self.kv_cache)

    @property
    def uses_text(self) -> bool:
        """Whether activations change the result, where there are any to look at."""
        return self.needs_text or self.search or self.method == "kmeans" or self.kind == "codebook"

    def check(self) -> None:
        """What the types cannot say; ConfigError names the key."""
        if self.method == "kmeans" and self.kind == "float":
            raise ConfigError('method kmeans makes codebooks; leave out kind, or write kind = "codebook"')
        if self.activations != "none" and (self.kind == "codebook" or self.method == "kmeans"):
            raise ConfigError('codebook weights go with 16-bit activations: activations = "none"')
        if self.method == "smoothquant" and self.activations == "none":
            raise ConfigError('smoothquant is for 8-bit activations: activations = "dynamic" or "static"')
        if self.budget and (self.budget < self.bits or self.kind != "int"):
            raise ConfigError(
                f"budget = {self.budget} cannot be met with {self.kind} weights of {self.bits} bits or more"
            )


class Prune(Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag="prune"):
    """Weights set to zero, or whole parts left out.

    Attributes:
        method: magnitude, wanda or sparsegpt (single weights); channels, heads, layers (parts), operators (whole
            attentions and feed-forwards), vocabulary (tokens that the text uses least), or kv-heads (keys and
            values of neighbouring heads become their mean), rank (directions of the feed-forwards' matrices).
        ratio: share that goes.
        pattern: "" any place, or "2:4": two of every four along a row (ratio does not count then).
        store: "dense", which loads everywhere, "bitmask": zeros are left out of the file (single weights), or
            "factors": two thin matrices in place of one (rank).
        ignore: modules to leave, by name or as "re:" and a pattern.
    """

    method: Literal[
        "magnitude", "wanda", "sparsegpt", "channels", "heads", "kv-heads", "layers", "operators", "vocabulary", "rank"
    ] = "magnitude"
    ratio: Share = 0.5
    pattern: Literal["", "2:4"] = ""
    store: Literal["dense", "bitmask", "factors"] = "dense"
    ignore: tuple[str, ...] = ()

    @property
    def needs_text(self) -> bool:
        return self.method not in ("magnitude", "kv-heads")

    @property
    def uses_text(self) -> bool:
        return self.needs_text

    def check(self) -> None:
        is_sparse = self.method in ("magnitude", "wanda", "sparsegpt")
        if self.pattern and not is_sparse:
            raise ConfigError(f"pattern = {self.pattern!r} is for single weights: magnitude, wanda or sparsegpt")
        if self.store == "factors" and self.method != "rank":
            raise ConfigError('store = "factors" is for matrices of low rank: method = "rank"')
        if self.store == "bitmask" and not is_sparse and self.method != "operators":
            raise ConfigError(f"store = {self.store!r} is for zeros: magnitude, wanda, sparsegpt or operators")


class Rotate(Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag="rotate"):
    """The residual stream turned, so that no feature stands out; what the network computes stays the same.

    Attributes:
        seed: of the rotation.
    """

    seed: int = 0

    @property
    def needs_text(self) -> bool:
        return False

    def check(self) -> None:
        """Nothing to add to the types."""


class Distill(Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag="distill"):
    """A model trained to answer as the original does: the result of the step before, or a smaller student.

    Attributes:
        teacher: folder, or address of a server that runs it (http://...); the model that the recipe began with when
            left out.
        top: likeliest tokens of which a server or a cache tells the probabilities.
        cache: folder that keeps what the teacher says, for runs with other students or losses.
        student: folder to begin with; the result of the step before when left out.
        layers: begin with these layers of the student alone.
        shape: begin with random weights, in the teacher's architecture with these keys of config.json changed.
        text: training text; the calibration text when left out.
        steps, batch_size, length, learning_rate: of the training.
        temperature: of both sides' probabilities.
        soft, hard, hidden, attention: weights of the losses: the teacher's probabilities, the text itself, hidden
            states through a projection, and relations among the last layer's queries, keys and values (MiniLM).
        on_policy: share of steps on what the student itself writes after half a window, with soft labels alone.
        divergence: of the soft labels: forward, reverse or jsd.
        lora_rank: train matrices of this rank beside the weights, and add them at the end; 0: train all weights.
        sparsity, sparsity_schedule: set the smallest weights to zero on the way, up to this share of each matrix.
        bits, group_size: round the weights in every pass, as "quantize" by rtn with search = false does; 0: not.
        seed: of the order of windows and of projections.
    """

    teacher: str = ""
    top: Annotated[int, Meta(ge=1, le=256)] = 20
    cache: str = ""
    student: str = ""
    layers: tuple[int, ...] = ()
    shape: dict[str, int] = {}
    text: str = ""
    steps: Count = 200
    batch_size: Count = 8
    length: Count = 256
    learning_rate: Annotated[float, Meta(gt=0)] = 3e-4
    temperature: Annotated[float, Meta(gt=0)] = 2.0
    soft: Annotated[float, Meta(ge=0)] = 1.0
    hard: Annotated[float, Meta(ge=0)] = 0.5
    hidden: Annotated[float, Meta(ge=0)] = 0.0
    attention: Annotated[float, Meta(ge=0)] = 0.0
    on_policy: Annotated[float, Meta(ge=0, le=1)] = 0.0
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    lora_rank: Annotated[int, Meta(ge=0)] = 0
    sparsity: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    sparsity_schedule: Literal["cubic", "linear"] = "cubic"
    bits: Literal[0, 2, 3, 4, 6, 8] = 0
    group_size: Annotated[int, Meta(ge=0)] = 0
    seed: int = 0

    @property
    def needs_text(self) -> bool:
        return not self.text

    @property
    def hears_few(self) -> bool:
        """Whether only the teacher's likeliest tokens are heard."""
        return bool(self.cache) or self.teacher.startswith(("http://", "https://"))

    def check(self) -> None:
        if not (self.soft or self.hard or self.hidden or self.attention):
            raise ConfigError("distill: all weights of losses are 0; give soft, hard, hidden or attention one")
        if self.shape and (self.student or self.layers):
            raise ConfigError("distill: shape begins with random weights; leave out student and layers, or shape")
        if self.hears_few and (self.hidden or self.attention or self.divergence != "forward"):
            raise ConfigError(
                "distill: hidden, attention and other divergences need a teacher's folder, not a server or a cache"
            )
        if self.on_policy and (self.cache or not self.soft):
            raise ConfigError("distill: on_policy needs soft labels of new texts: soft above 0, and no cache")
        if self.sparsity and self.lora_rank:
            raise ConfigError("distill: lora_rank leaves the weights alone, but sparsity sets some to zero; give one")
        if self.shape and self.lora_rank:
            raise ConfigError("distill: random weights (shape) cannot be learnt with lora_rank; leave out one")


class Window(Struct, frozen=True, forbid_unknown_fields=True, tag_field="do", tag="window"):
    """Attention that sees the last tokens alone.

    Attributes:
        size: how many.
        full_every: every so many layers one keeps seeing all (Qwen); 0: none.
    """

    size: Count
    full_every: Annotated[int, Meta(ge=0)] = 0

    @property
    def needs_text(self) -> bool:
        return False

    def check(self) -> None:
        """Nothing to add to the types."""


Step = Quantize | Prune | Rotate | Window | Distill


class Recipe(Struct, frozen=True, forbid_unknown_fields=True):
    """The steps, what they look at, and what the result is judged on."""

    steps: Annotated[tuple[Step, ...], Meta(min_length=1)]
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe; ConfigError names the key that is unknown or has a wrong value."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"the recipe {path} is not valid TOML: {error}") from error
    return make_recipe(values)


def make_recipe(values: dict[str, Any]) -> Recipe:
    """A checked recipe from plain values."""
    try:
        recipe = msgspec.convert(values, Recipe)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the recipe does not fit: {error}; docs/compression.md lists the keys") from error
    if bool(recipe.evaluation.task) != bool(recipe.evaluation.examples):
        raise ConfigError("evaluation.task and evaluation.examples (a file of them) are given together")
    for number, step in enumerate(recipe.steps, 1):
        step.check()
        if isinstance(step, Quantize) and number < len(recipe.steps):
            raise ConfigError(f"step {number} quantises, but steps come after it; what is quantised cannot be changed")
        if isinstance(step, Prune) and step.store != "dense" and number < len(recipe.steps):
            raise ConfigError(f'step {number} stores "{step.store}", but steps come after it; only the last one can')
        if step.needs_text and not recipe.calibration.text:
            raise ConfigError(
                f"step {number} ({describe(step)}) looks at activations: give calibration.text (--calibration FILE), "
                'a plain text file, or "generated" for samples of the model itself'
            )
    return recipe


def describe(step: Step) -> str:
    """A few words for people."""
    if isinstance(step, Quantize):
        return f"quantize {step.method} {step.kind}{step.bits}"
    return f"prune {step.method}" if isinstance(step, Prune) else type(step).__name__.lower()
