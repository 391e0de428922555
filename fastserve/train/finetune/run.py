"""`fastserve finetune TASK`: model folder, examples and kind joined into one run of the loop.

RUN/finetune.json, log.jsonl    what was asked and how it went
RUN/checkpoints/                to go on from
RUN/model/                      the tuned folder, with its scores in the card
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastserve.core.errors import CheckpointError, ConfigError
from fastserve.train import launch
from fastserve.train.card import write_card_page
from fastserve.train.checkpoints import Checkpoints, Position
from fastserve.train.finetune.adapters import add_adapters, merged
from fastserve.train.finetune.chat import Instruction, Preference
from fastserve.train.finetune.examples import Example, divide, read_examples
from fastserve.train.finetune.labels import Classification, TokenClassification
from fastserve.train.finetune.sequences import Sequences
from fastserve.train.finetune.settings import TASKS, FinetuneSettings
from fastserve.train.finetune.spans import QuestionAnswering
from fastserve.train.finetune.task import Encoded, Kind
from fastserve.train.finetune.vectors import Embedding
from fastserve.train.loop import Trainer
from fastserve.train.mesh import Mesh
from fastserve.train.network import SAFELY, check_length, open_config, open_tokenizer, save_model_folder
from fastserve.train.objectives import Batch
from fastserve.train.settings import OptimizerSection, TrainSection
from fastserve.train.watch import RunWatch, Silence

if TYPE_CHECKING:
    import torch

KINDS: dict[str, Any] = dict(
    zip(
        TASKS,
        (Instruction, Preference, QuestionAnswering, Classification, TokenClassification, Sequences, Embedding),
        strict=True,
    )
)
_CHECKPOINTS_PER_RUN = 10
_POOL = 16  # batches whose items are brought into the order of their lengths
CLAIM = "finetune.json"  # in the run's folder: what was asked


def finetune(task: str, model: str, data: Path, run: Path, settings: FinetuneSettings) -> dict[str, Any]:
    """Tune the folder `model` on the examples in `data`, into the folder `run`; returns the scores before and after.

    Goes on from the last checkpoint of `run`, if there is one. Under torchrun this is called on every process, and
    they share each batch. ConfigError for examples or a model that do not fit.
    """
    mesh = Mesh.start(None)
    try:
        kind, rows, training, held_out = _opened(task, model, data, settings, mesh.num_processes)
        network = open_network(kind, model, rows, "auto" if settings.qlora else "float32")
        check_length(network.config, settings.max_length, "max_length")
        if settings.lora_rank:
            network = add_adapters(network, settings)
        if isinstance(kind, Preference):
            kind.prepare(network.eval(), [*training, *held_out])
        items = kind.encode(training)
        if mesh.is_first:
            claim(run, task, model, data, settings)
        mesh.wait()
        tuning = Tuning(kind, items, held_out, settings, Path(model), run, task)
        if mesh.is_first:
            tuning.before = tuning.scores(network)
        trainer = Trainer(
            network,
            tuning,
            tuning.train_section(),
            tuning.optimizer_section(),
            mesh=mesh,
            checkpoints=Checkpoints(run / "checkpoints", mesh, keep=1),
            watch=RunWatch(run, "finetune", tuning.num_steps) if mesh.is_first else Silence(),
            seed=settings.seed,
            report_every=max(1, min(10, tuning.num_steps // 10)),
        )
        trainer.run()
    finally:
        mesh.close()
    return tuning.measured


def tune(
    task: str, model: str, data: Path, run: Path, settings: FinetuneSettings, num_processes: int, max_restarts: int
) -> dict[str, Any]:
    """`finetune` on one process or on several of this machine; what would stop it is found before they are started."""
    if num_processes == 1:
        return finetune(task, model, data, run, settings)
    kind, rows, training, _ = _opened(task, model, data, settings, num_processes)
    config = open_config(model)
    kind.configure(config, rows)
    check_length(config, settings.max_length, "max_length")
    if len(kind.encode(training)) < num_processes:
        raise ConfigError(f"the examples are too few for {num_processes} processes")
    claim(run, task, model, data, settings)
    launch.launch(run / CLAIM, run, num_processes, max_restarts)
    measured: dict[str, Any] = json.loads((run / "model" / "fastserve.json").read_text(encoding="utf-8"))["measured"]
    return measured


def _opened(
    task: str, model: str, data: Path, settings: FinetuneSettings, num_processes: int
) -> tuple[Any, list[Example], list[Example], list[Example]]:
    """(kind, all rows, those to learn, those to measure)."""
    if settings.batch_size % num_processes:
        raise ConfigError(f"batch_size {settings.batch_size} does not divide among {num_processes} processes")
    kind = KINDS[task](open_tokenizer(Path(model)), settings)
    rows = read_examples(data)
    if settings.validation:
        training, held_out = rows, read_examples(Path(settings.validation))
    else:
        training, held_out = divide(rows, settings.validation_share, settings.seed)
    return kind, rows, training, held_out[: settings.evaluate_examples or None]


class Tuning:
    """A kind and its examples as the loop sees them; every epoch has another order."""

    def __init__(
        self,
        kind: Kind,
        items: list[Encoded],
        held_out: list[Example],
        settings: FinetuneSettings,
        model: Path,
        run: Path,
        task: str,
    ) -> None:
        self._kind, self._items, self._held_out, self._settings = kind, items, held_out, settings
        self._model, self._run, self._task = model, run, task
        self._batch_size = min(settings.batch_size, len(items))
        self._steps_per_epoch = len(items) // self._batch_size
        self._lengths = np.array([_length(item) for item in items])
        self.num_steps = settings.steps or max(1, math.ceil(settings.epochs * self._steps_per_epoch))
        self.before: dict[str, float] = {}
        self.measured: dict[str, Any] = {}

    def train_section(self) -> TrainSection:
        every = max(1, self.num_steps // _CHECKPOINTS_PER_RUN)
        return TrainSection(
            batch_tokens=1,
            precision=self._settings.precision,
            gradient_checkpointing=self._settings.gradient_checkpointing,
            evaluate_every=min(self._steps_per_epoch, self.num_steps),
            checkpoint_every=every,
            spike_factor=0.0,
        )

    def optimizer_section(self) -> OptimizerSection:
        return OptimizerSection(
            kind=self._settings.optimizer,
            learning_rate=self._settings.learning_rate,
            muon_learning_rate=self._settings.muon_learning_rate or self._settings.learning_rate,
            weight_decay=self._settings.weight_decay,
            beta_2=0.999,
            schedule="linear",
            warmup_steps=round(self._settings.warmup_share * self.num_steps),
            final_share=0.0,
        )

    def micro_batches(self, step: int, rank: int, num_ranks: int) -> list[Batch]:
        epoch, place = divmod(step, self._steps_per_epoch)
        order = self._order(epoch)
        chosen = [self._items[index] for index in order[place * self._batch_size :][: self._batch_size]]
        own = len(chosen) // num_ranks
        chosen = chosen[rank * own :][:own]
        size = self._settings.micro_batch_size or own
        return [self._kind.batch(chosen[start : start + size]) for start in range(0, len(chosen), size)]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The items of an epoch, shuffled; grouped by length, batches of like items come in an order of their own."""
        chooser = np.random.default_rng([self._settings.seed, epoch])
        order = chooser.permutation(len(self._items))
        if not self._settings.group_by_length:
            return order
        size = self._batch_size
        order = order[: self._steps_per_epoch * size]
        pools = [order[start : start + _POOL * size] for start in range(0, len(order), _POOL * size)]
        by_length = np.concatenate([pool[np.argsort(self._lengths[pool], kind="stable")] for pool in pools])
        return by_length.reshape(-1, size)[chooser.permutation(self._steps_per_epoch)].ravel()

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self._kind.loss(model, batch)

    def scores(self, network: Any) -> dict[str, float]:
        import torch

        network.eval()
        with torch.no_grad():
            return self._kind.score(network, self._held_out)

    def evaluate(self, trainer: Trainer) -> dict[str, Any]:
        """The scores, on the first process."""
        if trainer.mesh.is_first:
            self.measured = {**self.scores(trainer.network), "before": self.before}
        return self.measured

    def export(self, trainer: Trainer, position: Position, measured: dict[str, Any]) -> None:
        if trainer.mesh.is_first:
            self._write_folder(trainer.network, position, measured)
        trainer.mesh.wait()

    def _write_folder(self, network: Any, position: Position, measured: dict[str, Any]) -> None:
        from fastserve import __version__

        if self._settings.lora_rank:
            if not self._settings.merge:
                network.save_pretrained(self._run / "adapter")
            network = merged(network)
        card = {
            "name": self._run.name,
            "made_by": f"fastserve {__version__}, fastserve finetune {self._task}",
            "made_from": str(self._model),
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "step": position.step,
            "examples": len(self._items),
            "measured": measured,
            "settings": dataclasses.asdict(self._settings),
        }
        folder, settings = self._run / "model", self._settings
        weights = {name: parameter.detach().cpu() for name, parameter in network.named_parameters()}
        save_model_folder(folder, network, weights, self._model, settings.dtype, card)
        if settings.chat_template:
            template = Path(settings.chat_template).read_text(encoding="utf-8")
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        write_card_page(folder, self._run / "log.jsonl", card, "finetune")


def _length(item: Encoded) -> int:
    """Of all its lists: tokens, and labels that are as many."""
    return sum(len(value) for value in item.values() if isinstance(value, list))


def open_network(kind: Kind, model: str, rows: list[Example] | None, dtype: str = "float32") -> Any:
    """The folder's network with the head of the kind: a new one for `rows`, the folder's own without."""
    import torch
    import transformers

    try:
        config = open_config(model)
        if rows is not None:
            kind.configure(config, rows)
        else:
            kind.use_labels(config)
        torch.manual_seed(0)
        loader = getattr(transformers, kind.network_class)
        network = loader.from_pretrained(
            model, config=config, dtype=dtype, ignore_mismatched_sizes=rows is not None, **SAFELY
        )
        return network if rows is not None else network.requires_grad_(False).eval()
    except OSError as error:
        raise CheckpointError(f"cannot open {model}: {error}") from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{model} cannot be tuned for this task: {str(error).splitlines()[0]}") from error


def claim(run: Path, task: str, model: str, data: Path, settings: FinetuneSettings) -> None:
    """Make the folder this run's, or check that it is."""
    values = {"task": task, "model": model, "data": str(data), "settings": dataclasses.asdict(settings)}
    text = json.dumps(values, indent=1)
    path = run / CLAIM
    if path.exists():
        if path.read_text(encoding="utf-8") != text:
            raise ConfigError(f"{run} holds a run with other settings; choose another --out, or remove the folder")
        return
    if run.exists() and any(run.iterdir()):
        raise ConfigError(f"{run} is not empty and holds no run; choose another --out")
    run.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
