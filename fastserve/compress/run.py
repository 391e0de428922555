"""Run a recipe: each step turns a model folder into another, the last one is the result.

Everything that could fail for a reason the user can mend is looked at before the first step begins. Folders between
steps lie beside the target and go when the result is whole; a run that was interrupted goes on from them.
"""

from __future__ import annotations

import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from fastserve import __version__
from fastserve.checkpoint.folder import ModelFolder, read_json
from fastserve.compress import (
    calibration,
    distill,
    evaluate,
    mixed,
    prune,
    quantize,
    report,
    rotate,
    served,
    vocabulary,
    window,
)
from fastserve.compress.dense import expand
from fastserve.compress.folder_writer import CARD_FILE, FolderWriter, is_made, write_json
from fastserve.compress.network import Network
from fastserve.compress.quantize import Progress
from fastserve.compress.recipe import Distill, Prune, Quantize, Recipe, Rotate, Step, Window
from fastserve.core.errors import ConfigError
from fastserve.engine.memory import keep_freed_memory

REPORT_FILE = "report.html"
_KEPT_MEMORY = 4 << 20  # matrices of a layer lie in pieces between what stays, and would keep a multiple of them
Score = Callable[[str], dict[str, float]]  # a model folder -> figures by name


def compress(
    model: str, out: Path, recipe: Recipe, progress: Progress | None = None, score: Score | None = None
) -> ModelFolder:
    """Run `recipe` on a folder (or hub id, or "" for the built-in model) and write the result to `out`.

    Args:
        score: what a model folder reaches on `recipe.evaluation.examples`; needed where they are given.

    Returns:
        The new folder; its card (fastserve.json) says what was done and how much each layer lost.

    Raises:
        ConfigError: the recipe does not fit the model, or `out` holds something.
        CheckpointError: the folder is damaged, holds values that are not finite, or has an unknown architecture.
    """
    say = progress or (lambda *_: None)
    if recipe.evaluation.task and score is None:
        raise ConfigError("evaluation.task needs a function that scores a folder: compress(..., score=...)")
    keep_freed_memory(_KEPT_MEMORY)
    source = ModelFolder.open(model)
    _check(source, recipe, say)
    started = time.perf_counter()
    current = source
    between: list[Path] = []
    for number, step in enumerate(recipe.steps, 1):
        is_last = number == len(recipe.steps)
        target = out if is_last else out.with_name(f"{out.name}.step{number}")
        between += [] if is_last else [target]
        if not is_last and is_made(target, current, _settings(step, recipe)):
            current = ModelFolder.open(str(target))
            continue
        current = _run_step(current, target, step, recipe, source, say)
    for folder in between:
        shutil.rmtree(folder)
    _measure(source, current, recipe, time.perf_counter() - started, say, score)
    return current


def _score(folder: ModelFolder, score: Score) -> dict[str, float]:
    """Scores of a folder by its weights' values, whatever form they are stored in."""
    if not folder.config.get("quantization_config"):
        return score(str(folder.path))
    with tempfile.TemporaryDirectory(prefix="fastserve-score-") as place:
        return score(str(expand(folder, Path(place) / "plain").path))


def _measure(
    source: ModelFolder,
    result: ModelFolder,
    recipe: Recipe,
    seconds: float,
    progress: Progress,
    score: Score | None,
) -> None:
    """Add to the card what was gained and lost, and write report.html beside it."""
    card = read_json(result.path / CARD_FILE)
    found: dict[str, Any] = card["compressed"]
    found["bytes"] = {"original": source.weight_bytes, "compressed": result.weight_bytes}
    found["seconds"] = round(seconds, 2)
    found["peak_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    settings = recipe.evaluation
    if settings.text:
        found["loss"] = evaluate.compare(source, result, settings, progress).as_dict()
        if served.is_served(result):
            ids = calibration.text_ids(source, Path(settings.text), settings.tokens).tolist()
            prompts, before, speed_before = served.run(source, ids, settings.speed)
            _, after, speed_after = served.run(result, ids, settings.speed)
            sides = zip(prompts, before, after, strict=True)
            found["samples"] = [{"prompt": prompt, "original": old, "compressed": new} for prompt, old, new in sides]
            found["speed"] = {
                name: {"original": value, "compressed": speed_after[name]} for name, value in speed_before.items()
            }
    if score is not None and settings.task:
        scores = {"original": _score(source, score), "compressed": _score(result, score)}
        found["task"] = {"name": settings.task, **scores}
    write_json(result.path / CARD_FILE, card)
    (result.path / REPORT_FILE).write_text(report.page(found), encoding="utf-8")


def _check(source: ModelFolder, recipe: Recipe, progress: Progress) -> None:
    """Refuse before work starts."""
    if recipe.calibration.text and any(step.needs_text for step in recipe.steps):
        calibration.check_text(recipe.calibration.text, "calibration.text")
    if recipe.evaluation.text:
        calibration.check_text(recipe.evaluation.text, "evaluation.text")
        evaluate.check_task(source)
    if source.config.get("quantization_config"):
        raise ConfigError(f"{source.path} is quantised already; give the folder that it was made from")
    network = Network(source)
    channels: dict[str, int] = {}  # that a step before leaves
    _check_vocabulary(recipe)
    for step in recipe.steps:
        if isinstance(step, Quantize):
            plan = quantize.Plan.make(network, step)
            group = next(iter(plan.schemes.values())).weights.group_size
            if wrong := [count for count in channels.values() if group > 0 and count % group]:
                raise ConfigError(
                    f"the steps before leave {wrong[0]} channels, which groups of {group} do not divide; choose "
                    "another group_size (0: one scale per row) or another ratio"
                )
        elif isinstance(step, Prune):
            prune.check(network, step)
            channels |= prune.channels(network, step)
        elif isinstance(step, Rotate):
            rotate.check(network)
        elif isinstance(step, Window):
            window.check(network, step)
        else:
            distill.check(source, step, step.text or recipe.calibration.text)
    total = len(source.weights.names())
    for number, _ in enumerate(network.check_finite()):
        progress("check the weights", number + 1, total)


def _check_vocabulary(recipe: Recipe) -> None:
    """Models of other tokens cannot be held against each other token by token."""
    for number, step in enumerate(recipe.steps):
        if isinstance(step, Prune) and step.method == "vocabulary":
            if recipe.calibration.text == calibration.GENERATED:
                raise ConfigError("vocabulary keeps what a text uses: give calibration.text a file")
            if recipe.evaluation.text or any(isinstance(item, Distill) for item in recipe.steps[number:]):
                raise ConfigError(
                    "after vocabulary the tokens are others than the original's: leave out evaluation.text, and put "
                    "distill before it"
                )


def _settings(step: Step, recipe: Recipe) -> dict[str, Any]:
    """What a step's result depends on besides its model."""
    return {"step": msgspec.to_builtins(step), "calibration": msgspec.to_builtins(recipe.calibration)}


def _run_step(
    current: ModelFolder, target: Path, step: Step, recipe: Recipe, original: ModelFolder, progress: Progress
) -> ModelFolder:
    plain = _settings(step, recipe)
    writer = FolderWriter(target, current, plain)
    if isinstance(step, Distill):
        return _distill(current, step, recipe, original, writer, plain, progress)
    network = Network(current)
    if isinstance(step, Rotate):
        changes = rotate.run(network, step, writer, progress)
        return writer.finish({**current.config, **changes}, make_card(current, original, plain, {}))
    if isinstance(step, Window):
        changes = window.run(network, step, writer)
        return writer.finish({**current.config, **changes}, make_card(current, original, plain, {}))
    if isinstance(step, Prune) and step.method == "vocabulary":
        kept = vocabulary.choose(current, Path(recipe.calibration.text), step.ratio)
        changes = prune.drop_tokens(network, kept, writer)
        card = make_card(current, original, plain, {"tokens": len(kept)})
        return writer.finish({**current.config, **changes}, card, vocabulary.files(current, kept))
    if isinstance(step, Prune):
        changes, found = prune.run(network, step, _batches(network, step, recipe), writer, progress)
        return writer.finish({**current.config, **changes}, make_card(current, original, plain, found))
    plan = quantize.Plan.make(network, step)
    batches = _batches(network, step, recipe)
    if step.budget:
        plan = mixed.plan(network, plan, batches, writer, progress)
        network = Network(current)
    errors = quantize.run(network, plan, batches, writer, progress)
    config = {**current.config, "quantization_config": quantize.quantization_config(network, plan)}
    return writer.finish(config, make_card(current, original, plain, {"layer_errors": errors}))


def _distill(
    current: ModelFolder,
    step: Distill,
    recipe: Recipe,
    original: ModelFolder,
    writer: FolderWriter,
    plain: Mapping[str, Any],
    progress: Progress,
) -> ModelFolder:
    student = ModelFolder.open(step.student) if step.student else current
    if step.layers:
        short = writer.target.with_name(f"{writer.target.name}.student")
        if not is_made(short, student, plain):
            network, layers = Network(student), FolderWriter(short, student, plain)
            changes = prune.write_layers(network, list(step.layers), layers)
            layers.finish({**student.config, **changes}, {})
        student = ModelFolder.open(str(short))
    text = Path(step.text or recipe.calibration.text)
    changes, found = distill.run(original, student, step, text, writer, progress)
    result = writer.finish({**student.config, **changes}, make_card(current, original, plain, found))
    if step.layers:
        shutil.rmtree(student.path)
    return result


def _batches(network: Network, step: Quantize | Prune, recipe: Recipe) -> list[Mapping[str, Tensor]]:
    settings = recipe.calibration
    if not settings.text or not step.uses_text:
        return []
    return calibration.batches(network.folder, calibration.windows(network.folder, settings), settings.batch_size)


def make_card(
    current: ModelFolder, original: ModelFolder, step: Mapping[str, Any], found: Mapping[str, Any]
) -> dict[str, Any]:
    """fastserve.json: the steps so far, and what the last one found."""
    before = read_json(current.path / CARD_FILE) if current.has(CARD_FILE) else {}
    steps = [*before.get("compressed", {}).get("steps", []), {**step, **found}]
    return {
        "name": f"{original.name}-compressed",
        "made_by": f"fastserve {__version__}, fastserve compress",
        "compressed": {"from": original.name, "steps": steps},
    }
