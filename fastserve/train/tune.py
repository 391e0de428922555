"""`fastserve tune`: search the values of a recipe that its [search] table names, with Optuna.

A trial is a pretraining run with other values; its objective is the held-out loss, reported at every evaluation, so
that trials worse than the median of those before are ended early. The study is a file in the folder: a search that was
stopped goes on.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve.core.errors import ConfigError, FastServeError
from fastserve.train.pretrain import PretrainTask, RunParts, pretrain
from fastserve.train.recipe import build_section
from fastserve.train.settings import Recipe

if TYPE_CHECKING:
    import optuna

    from fastserve.train.loop import Trainer


def tune(recipe: Recipe, out: Path, num_trials: int) -> dict[str, Any]:
    """Run trials until `num_trials` are finished; returns the best values and their loss, also in OUT/best.json.

    ConfigError for a [search] that names no key of the recipe, before the first trial.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    check_search(recipe)
    if not RunParts(recipe).validation:
        raise ConfigError("a search needs held-out text: prepare the data with --validation-share above 0")
    out.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=recipe.name,
        storage=JournalStorage(JournalFileBackend(str(out / "study.log"))),
        load_if_exists=True,
        direction="minimize",
        sampler=optuna.samplers.TPESampler(seed=recipe.seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=3),
    )
    finished = sum(trial.state.is_finished() for trial in study.trials)
    study.optimize(lambda trial: _loss(recipe, trial, out), n_trials=max(0, num_trials - finished))
    done = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    if not done:
        raise FastServeError("no trial came to its end; widen [search] or lower the rates in it")
    best = {
        "values": study.best_params,
        "held_out_loss": study.best_value,
        "trials": len(study.trials),
        "pruned": sum(trial.state == optuna.trial.TrialState.PRUNED for trial in study.trials),
        "model": str(out / f"trial-{study.best_trial.number:04d}" / "model"),
    }
    (out / "best.json").write_text(json.dumps(best, indent=1), encoding="utf-8")
    return best


def check_search(recipe: Recipe) -> None:
    """ConfigError unless every key of [search] is a key of the recipe with a range or choices that it can take."""
    if not recipe.search:
        raise ConfigError(
            'the recipe has no [search] table; write for example "optimizer.learning_rate" = { low = 1e-4, '
            "high = 1e-2, log = true }"
        )
    for key, space in recipe.search.items():
        keys = set(space) if isinstance(space, dict) else set()
        if keys != {"choices"} and not {"low", "high"} <= keys <= {"low", "high", "log"}:
            raise ConfigError(f"search key {key!r}: give choices = [...], or low, high and perhaps log, not {space!r}")
        values = space.get("choices") or [space["low"], space["high"]]
        for value in values:
            with_values(recipe, {key: value})


def with_values(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """The recipe with other values under dotted keys; ConfigError where there is no such key."""
    plain = json.loads(json.dumps(recipe.as_dict()))
    for key, value in values.items():
        *sections, name = key.split(".")
        place = plain
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        is_open = sections[:2] == ["model", "config"]
        if not isinstance(place, dict) or (name not in place and not is_open):
            raise ConfigError(f"search key {key!r} is no key of the recipe")
        place[name] = value
    return build_section(Recipe, {name: item for name, item in plain.items() if item is not None}, "")


def _loss(recipe: Recipe, trial: optuna.Trial, out: Path) -> float:
    import optuna

    values = {key: _suggested(trial, key, space) for key, space in recipe.search.items()}
    try:
        measured = pretrain(
            with_values(recipe, values),
            out / f"trial-{trial.number:04d}",
            task=lambda *parts: _ReportingTask(*parts, trial=trial),
        )
    except FastServeError as error:
        if isinstance(error, ConfigError):
            raise
        trial.set_user_attr("failed", str(error))
        raise optuna.TrialPruned from error
    loss = float(measured["held_out_loss"])
    return loss if math.isfinite(loss) else math.inf


def _suggested(trial: optuna.Trial, key: str, space: dict[str, Any]) -> Any:
    if "choices" in space:
        return trial.suggest_categorical(key, copy.copy(space["choices"]))
    if isinstance(space["low"], int) and isinstance(space["high"], int):
        return trial.suggest_int(key, space["low"], space["high"], log=bool(space.get("log")))
    return trial.suggest_float(key, space["low"], space["high"], log=bool(space.get("log")))


class _ReportingTask(PretrainTask):
    """Tells the study of every evaluation, and ends a run that is worse than others were."""

    def __init__(self, recipe: Recipe, parts: RunParts, run: Path, *, trial: optuna.Trial) -> None:
        super().__init__(recipe, parts, run)
        self._trial = trial

    def evaluate(self, trainer: Trainer) -> dict[str, Any]:
        import optuna

        found = super().evaluate(trainer)
        self._trial.report(found["held_out_loss"], trainer.position.step)
        if self._trial.should_prune():
            raise optuna.TrialPruned
        return found
