"""Find the recipe for a wish: the least loss within a size, or the smallest folder within a loss.

Tries a ladder of quantisations, from eight bits down, and keeps the best; every variant that was tried goes into the
report, with which of them nothing else beats. Loss is the growth of perplexity on the evaluation text.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from fastserve.checkpoint.folder import ModelFolder, read_json
from fastserve.compress import calibration, report
from fastserve.compress.folder_writer import CARD_FILE, fingerprint, write_json
from fastserve.compress.quantize import Progress
from fastserve.compress.recipe import Calibration, Evaluation, Recipe, make_recipe
from fastserve.compress.run import REPORT_FILE, compress
from fastserve.core.config import format_bytes
from fastserve.core.errors import ConfigError

# From the largest to the smallest; name -> the step's keys.
LADDER: Mapping[str, Mapping[str, Any]] = {
    "int8": {"method": "rtn", "bits": 8},
    "int6": {"method": "gptq", "bits": 6},
    "int4 in 32": {"method": "gptq", "bits": 4, "group_size": 32},
    "int4 in 128": {"method": "gptq", "bits": 4, "group_size": 128},
    "codebook4": {"method": "kmeans", "bits": 4},
    "int3 in 64": {"method": "gptq", "bits": 3, "group_size": 64},
    "codebook3": {"method": "kmeans", "bits": 3},
}

_MARK = "search"  # of a variant's card: which model, texts and step it was tried with


def search(
    model: str,
    out: Path,
    calibrate: Calibration,
    judge: Evaluation,
    max_bytes: int = 0,
    max_loss: float = 0.0,
    progress: Progress | None = None,
) -> ModelFolder:
    """Write the best variant to `out`.

    Args:
        max_bytes: the largest size of the weights; the result has the least loss within it.
        max_loss: the largest growth of perplexity, as a share; the result is the smallest within it.

    Raises:
        ConfigError: neither or both limits, a text is missing, or no variant keeps the limit.
    """
    if bool(max_bytes) == bool(max_loss):
        raise ConfigError("a search needs one limit: max_size or max_loss")
    if not judge.text or not calibrate.text:
        raise ConfigError("a search needs calibration.text and evaluation.text (--calibration and --evaluation)")
    calibration.check_text(calibrate.text, "calibration.text")
    calibration.check_text(judge.text, "evaluation.text")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} exists and is not empty; give --out another name or remove it")
    source = ModelFolder.open(model)
    tried: list[dict[str, Any]] = []
    for name, step in LADDER.items():
        if _divides(source, int(step.get("group_size", 0))):
            tried.append({"name": name, **_try(model, _folder(out, name), step, calibrate, judge, progress)})
    best = _best(tried, max_bytes, max_loss)
    _folder(out, best["name"]).replace(out)
    for item in tried:
        shutil.rmtree(_folder(out, item["name"]), ignore_errors=True)
    card = read_json(out / CARD_FILE)
    del card[_MARK]
    card["compressed"]["variants"] = tried
    write_json(out / CARD_FILE, card)
    (out / REPORT_FILE).write_text(report.page(card["compressed"]), encoding="utf-8")
    return ModelFolder.open(str(out))


def _folder(out: Path, name: str) -> Path:
    return out.with_name(f"{out.name}.try-{name.replace(' ', '-')}")


def _divides(source: ModelFolder, group_size: int) -> bool:
    sizes = [source.config.get(key) for key in ("hidden_size", "intermediate_size", "d_model", "d_ff")]
    return not group_size or all(size % group_size == 0 for size in sizes if isinstance(size, int))


def _try(
    model: str,
    folder: Path,
    step: Mapping[str, Any],
    calibrate: Calibration,
    judge: Evaluation,
    progress: Progress | None,
) -> dict[str, Any]:
    made = make_recipe({"steps": [{"do": "quantize", **step}]} | {"calibration": {"text": calibrate.text}})
    recipe = Recipe(made.steps, calibrate, judge)
    mark = fingerprint(ModelFolder.open(model), msgspec.to_builtins(recipe))
    if not folder.exists() or read_json(folder / CARD_FILE).get(_MARK) != mark:
        shutil.rmtree(folder, ignore_errors=True)  # it was interrupted before it was judged, or is of another search
        compress(model, folder, recipe, progress)
        write_json(folder / CARD_FILE, {**read_json(folder / CARD_FILE), _MARK: mark})
    card = read_json(folder / CARD_FILE)["compressed"]
    loss = card["loss"]
    return {"bytes": card["bytes"]["compressed"], "perplexity": loss["perplexity"], "increase": loss["increase"]}


def _best(tried: list[dict[str, Any]], max_bytes: int, max_loss: float) -> dict[str, Any]:
    if max_bytes:
        within = [item for item in tried if item["bytes"] <= max_bytes]
        smallest = min(tried, key=lambda item: item["bytes"])
        if not within:
            raise ConfigError(
                f"no variant is within {format_bytes(max_bytes)}; the smallest, {smallest['name']}, takes "
                f"{format_bytes(smallest['bytes'])}. Prune or distil the model first"
            )
        return min(within, key=lambda item: item["perplexity"])
    within = [item for item in tried if item["increase"] <= max_loss]
    closest = min(tried, key=lambda item: item["increase"])
    if not within:
        raise ConfigError(f"no variant loses at most {max_loss:.2%}; {closest['name']} loses {closest['increase']:.2%}")
    return min(within, key=lambda item: item["bytes"])
