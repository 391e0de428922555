"""`fastserve pretrain`: a recipe, its token shards and its network joined into one run of the loop.

RUN/recipe.json, log.jsonl, tensorboard/    what was asked and how it went
RUN/checkpoints/                            to go on from
RUN/models/step-..., RUN/model              a model folder of every evaluation, and the newest (a link)
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve.core.errors import ConfigError
from fastserve.train.card import write_card_page
from fastserve.train.checkpoints import Checkpoints, Position
from fastserve.train.data.shards import TokenDataset, tokenizer_hash
from fastserve.train.loop import Trainer
from fastserve.train.mesh import Mesh, check_tensor_plan
from fastserve.train.network import (
    bare_config,
    first_position,
    make_config,
    make_network,
    open_tokenizer,
    save_model_folder,
)
from fastserve.train.objectives import (
    Batch,
    Causal,
    Masked,
    Objective,
    SentenceOrder,
    SpanCorruption,
    SpecialIds,
    num_labels,
)
from fastserve.train.plan import measured_peak
from fastserve.train.rows import MixedRows, PackedRows, Rows, WindowRows
from fastserve.train.settings import ObjectiveSection, Phase, Recipe
from fastserve.train.watch import RunWatch, Silence

if TYPE_CHECKING:
    import torch

_VALIDATION_ROWS = 8  # rows of a validation batch
# What may change between the runs of one folder: how, not what.
_FREE_SECTIONS = ("parallel", "watch", "train", "optimizer", "search")


def pretrain(
    recipe: Recipe, run: Path, task: Callable[[Recipe, RunParts, Path], PretrainTask] | None = None
) -> dict[str, Any]:
    """Run a recipe to its end in the folder `run`, from its last checkpoint if there is one; returns what was measured.

    `task` makes what the loop runs, in place of PretrainTask. Under torchrun this is called on every
    process. ConfigError, before the first step, for a recipe that cannot work.
    """
    import torch

    parts = RunParts(recipe)
    running = (task or PretrainTask)(recipe, parts, run)
    mesh = Mesh.start(recipe.parallel)
    try:
        if mesh.is_first:
            claim_run(run, recipe)
        mesh.wait()
        network = make_network(recipe.model, parts.config, recipe.objective.kind, recipe.seed)
        watch = recipe.watch
        trainer = Trainer(
            network,
            running,
            recipe.train,
            recipe.optimizer,
            mesh=mesh,
            checkpoints=Checkpoints(run / "checkpoints", mesh, recipe.train.keep_checkpoints),
            watch=RunWatch(run, "pretrain", recipe.num_steps, tensorboard=watch.tensorboard, wandb=watch.wandb_project)
            if mesh.is_first
            else Silence(),
            seed=recipe.seed,
            report_every=watch.report_every,
            peak_flops=mesh.num_processes * measured_peak(mesh.device, getattr(torch, recipe.train.precision)),
            inputs=parts.objectives[0].inputs,
        )
        trainer.run()
    finally:
        mesh.close()
    return running.measured


class RunParts:
    """What a recipe names, opened and checked against each other: data, tokenizer, configuration, objective.

    ConfigError for folders that are missing or empty, tokenizers that differ, a network that does not fit.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.train = {name: TokenDataset(_shards(folder), "train") for name, folder in recipe.data.sources.items()}
        validation = {name: _validation(_shards(folder)) for name, folder in recipe.data.sources.items()}
        held_out = {name: TokenDataset(_shards(folder), "train") for name, folder in recipe.data.held_out.items()}
        self.validation = {name: data for name, data in validation.items() if data is not None} | held_out
        hashes = {name: data.tokenizer_sha256 for name, data in (self.train | held_out).items()}
        first = next(iter(hashes))
        for name, sha256 in hashes.items():
            if sha256 != hashes[first]:
                raise ConfigError(
                    f"the sources {first!r} and {name!r} were packed with different tokenizers; pack one anew"
                )
        if recipe.model.folder and tokenizer_hash(Path(recipe.model.folder)) != hashes[first]:
            raise ConfigError(
                f"the data was packed with another tokenizer than that of {recipe.model.folder}; prepare it with "
                f"--tokenizer {recipe.model.folder}"
            )
        self.tokenizer_folder = self.train[first].folder / "tokenizer"
        self.tokenizer = open_tokenizer(self.tokenizer_folder)
        longest = max(phase.length for phase in recipe.phases)
        self.config = make_config(recipe.model, self.tokenizer, recipe.objective.kind, longest)
        self.objectives = [self.objective(recipe.objective, phase.length) for phase in recipe.phases]

    def objective(self, section: ObjectiveSection, length: int) -> Objective:
        special = SpecialIds(self.tokenizer)
        if section.kind == "causal":
            return Causal(length, section.packing)
        if section.kind == "masked":
            return Masked(length, section, special, first_position(self.config))
        kind = SentenceOrder if section.kind == "sentence-order" else SpanCorruption
        return kind(length, section, special)

    def rows(self, data: TokenDataset, objective: Objective, kind: str, seed: int) -> Rows:
        """The rows that an objective reads: packed documents opened and closed by their tokens, or windows."""
        if kind in ("sentence-order", "span-corruption"):
            return WindowRows(data, objective.row_length, seed)
        special = SpecialIds(self.tokenizer)
        if kind == "masked":
            return PackedRows(
                data, objective.row_length, seed, start_ids=(special.start,), end_ids=(special.end,), overlap=0
            )
        begin, end = self.tokenizer.bos_token_id, special.end
        start_ids = () if begin is None else (int(begin),)
        return PackedRows(data, objective.row_length, seed, start_ids=start_ids, end_ids=(end,), overlap=1)


class PretrainTask:
    """The recipe as the loop sees it."""

    def __init__(self, recipe: Recipe, parts: RunParts, run: Path) -> None:
        self._recipe, self._parts, self._run = recipe, parts, run
        self.num_steps = recipe.num_steps
        self.measured: dict[str, Any] = {}
        self._mixtures = [
            self._mixture(phase, objective, recipe.seed + 1000 * index)
            for index, (phase, objective) in enumerate(zip(recipe.phases, parts.objectives, strict=True))
        ]
        self._held_out = {name: self._validation_rows(name, data) for name, data in parts.validation.items()}

    def micro_batches(self, step: int, rank: int, num_ranks: int) -> list[Batch]:
        index, first_step = self._phase_at(step)
        phase, objective = self._recipe.phases[index], self._parts.objectives[index]
        num_rows = self._recipe.train.batch_tokens // phase.length
        own, size = num_rows // num_ranks, self._recipe.pass_rows(phase.length)
        first = (step - first_step) * num_rows + rank * own
        rows = self._mixtures[index].rows(first, own)
        return [objective.batch(rows[start : start + size], self._recipe.seed) for start in range(0, own, size)]

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self._parts.objectives[0].loss(model, batch)

    def evaluate(self, trainer: Trainer) -> dict[str, Any]:
        found: dict[str, Any] = {}
        total, count = 0.0, 0.0
        for name, data in self._parts.validation.items():
            source_total, source_count = self._validate(trainer, self._held_out[name])
            loss = source_total / source_count
            found[f"held_out_loss_{name}"] = round(loss, 6)
            if self._recipe.objective.kind == "causal":
                found[f"perplexity_{name}"] = round(math.exp(min(loss, 50)), 4)
                found[f"bits_per_byte_{name}"] = round(loss / math.log(2) * data.num_tokens / data.num_bytes, 5)
            total, count = total + source_total, count + source_count
        if count:
            found["held_out_loss"] = round(total / count, 6)
        if self._recipe.objective.kind == "causal" and self._recipe.watch.samples:
            found["samples"] = self._samples(trainer)
        self.measured = found
        return found

    def export(self, trainer: Trainer, position: Position, measured: dict[str, Any]) -> None:
        weights = trainer.whole_weights()
        if trainer.mesh.is_first:
            folder = self._run / "models" / f"step-{position.step:08d}"
            folder.parent.mkdir(exist_ok=True)
            card = self._card(trainer, position, measured)
            save_model_folder(
                folder, trainer.network, weights, self._parts.tokenizer_folder, self._recipe.model.dtype, card
            )
            write_card_page(folder, self._run / "log.jsonl", card)
            link_newest(self._run / "model", folder, self._recipe.train.keep_checkpoints)
        trainer.mesh.wait()

    def _mixture(self, phase: Phase, objective: Objective, seed: int) -> MixedRows:
        weights = phase.mixture or {name: float(data.num_tokens) for name, data in self._parts.train.items()}
        names = [name for name, weight in weights.items() if weight > 0]
        rows = [
            self._parts.rows(self._parts.train[name], objective, self._recipe.objective.kind, seed + position)
            for position, name in enumerate(names)
        ]
        return MixedRows(rows, [weights[name] for name in names])

    def _phase_at(self, step: int) -> tuple[int, int]:
        """(number of the phase, its first step); steps behind the last phase are of the last."""
        first = 0
        phases = self._recipe.phases
        for index, phase in enumerate(phases):
            if step < first + phase.steps or index == len(phases) - 1:
                return index, first
            first += phase.steps
        raise AssertionError("a recipe has a phase")

    def _validation_rows(self, name: str, data: TokenDataset) -> Rows:
        recipe = self._recipe
        try:
            return self._parts.rows(data, self._parts.objectives[-1], recipe.objective.kind, recipe.seed)
        except ConfigError as error:
            raise ConfigError(
                f"held-out text of {name!r}: {error}; `data prepare --validation-share` says how much is kept, 0: none"
            ) from None

    def _validate(self, trainer: Trainer, source: Rows) -> tuple[float, float]:
        """(sum of losses, labels) over validation rows, shared among the processes."""
        objective, recipe, mesh = self._parts.objectives[-1], self._recipe, trainer.mesh
        wanted = max(1, recipe.data.validation_tokens // objective.row_length)
        number = min(source.per_epoch, wanted)
        # Every process must make as many passes: where rows do not go round, all take the same ones.
        shared = number >= mesh.data_size
        own = number // mesh.data_size if shared else number
        mixed, first = MixedRows([source], [1.0]), mesh.data_rank * own if shared else 0
        total, count = 0.0, 0
        for start in range(0, own, _VALIDATION_ROWS):
            batch = objective.batch(mixed.rows(first + start, min(_VALIDATION_ROWS, own - start)), recipe.seed)
            count += num_labels(batch)
            total += trainer.batch_loss(batch)
        return mesh.sum_over_data(total), mesh.sum_over_data(count)

    def _samples(self, trainer: Trainer) -> dict[str, str]:
        import torch

        found = {}
        for prompt in self._recipe.watch.samples:
            begin = self._parts.tokenizer.bos_token_id
            ids = [*([] if begin is None else [begin]), *self._parts.tokenizer.encode(prompt, add_special_tokens=False)]
            inputs = torch.tensor([ids], device=trainer.mesh.device)
            with torch.no_grad():
                tokens = trainer.network.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    do_sample=False,
                    max_new_tokens=self._recipe.watch.sample_tokens,
                )
            found[prompt] = self._parts.tokenizer.decode(tokens[0, len(ids) :], skip_special_tokens=True)
        return found

    def _card(self, trainer: Trainer, position: Position, measured: dict[str, Any]) -> dict[str, Any]:
        from fastserve import __version__

        return {
            "name": self._recipe.name,
            "made_by": f"fastserve {__version__}, fastserve pretrain",
            "parameters": trainer.num_parameters,
            "step": position.step,
            "tokens": position.step * self._recipe.train.batch_tokens,
            "rows_skipped_after_divergence": position.skipped,
            "measured": measured,
            "tokenizer_sha256": next(iter(self._parts.train.values())).tokenizer_sha256,
            "recipe": self._recipe.as_dict(),
        }


def check(recipe: Recipe, num_processes: int) -> None:
    """Raise what would stop the run, before any process is started."""
    parts = RunParts(recipe)
    config = parts.config
    PretrainTask(recipe, parts, Path())
    Mesh(recipe.parallel, 0, num_processes)
    if recipe.parallel.tensor > 1:
        check_tensor_plan(config, recipe.parallel.tensor)
    if recipe.parallel.pipeline > 1:
        from fastserve.train.pipeline import check_cut

        check_cut(config, recipe.parallel.pipeline)


def plan_config(recipe: Recipe) -> Any:
    """The network's configuration for a plan: from the data where it is there, else with the recipe's vocab_size."""
    try:
        return RunParts(recipe).config
    except ConfigError:
        if "vocab_size" not in recipe.model.config:
            raise
    return bare_config(recipe.model)


def claim_run(run: Path, recipe: Recipe) -> None:
    """Make the folder this recipe's run, or check that it is; what is learnt from what must not change."""
    values = json.loads(json.dumps(recipe.as_dict()))
    path = run / "recipe.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if changed := [name for name in values if name not in _FREE_SECTIONS and before.get(name) != values[name]]:
            raise ConfigError(
                f"{run} holds a run with another [{changed[0]}]; choose another --out, or remove the folder"
            )
    elif run.exists() and any(run.iterdir()):
        raise ConfigError(f"{run} is not empty and holds no run; choose another --out")
    run.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1), encoding="utf-8")
    os.replace(partial, path)


def link_newest(link: Path, folder: Path, keep: int) -> None:
    """Point `link` at the newest model folder and remove the oldest beyond `keep`."""
    fresh = link.with_name(f".{link.name}.partial")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(folder.relative_to(link.parent))
    os.replace(fresh, link)
    for old in sorted(folder.parent.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def _shards(folder: str) -> Path:
    """The shard folder that a recipe names, or the one in the prepared folder it names."""
    path = Path(folder)
    return path / "tokens" if (path / "tokens").is_dir() else path


def _validation(folder: Path) -> TokenDataset | None:
    from fastserve.train.data.shards import read_index

    shards = read_index(folder)["splits"].get("validation", [])
    return TokenDataset(folder, "validation") if sum(shard["tokens"] for shard in shards) else None
