"""Pipeline parallelism: a network cut into stages of consecutive layers, one for each process of a pipeline.

A stage is the network itself with stand-ins for what the others have: its weights keep their names, and transformers'
own forward pass makes masks and positions on every stage. torch.distributed.pipelining sends hidden states and
gradients, and orders the passes: one backward after each forward (Narayanan et al. 2021, "Efficient large-scale
language model training on GPU clusters", section 2.2.1), or all forward first (GPipe, Huang et al. 2019) where a step
has fewer passes than there are stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from fastserve.core.errors import ConfigError
from fastserve.train.mesh import Mesh
from fastserve.train.objectives import IGNORED, Batch, label_loss

# Embeddings, one stack of layers and a head, in this order, with nothing between them that is not a module of its own.
# Each type is tried in tests/unit/train/test_pipeline.py.
TYPES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "bert", "roberta")

Tensors = dict[str, torch.Tensor]


def check_cut(config: Any, num_stages: int) -> None:
    """ConfigError unless a network of this configuration can be cut into so many stages."""
    if config.model_type not in TYPES:
        raise ConfigError(
            f"recipe key parallel.pipeline: networks of type {config.model_type!r} cannot be cut into stages, those of "
            f"{', '.join(TYPES)} can; use data or shard"
        )
    if config.num_hidden_layers < num_stages:
        raise ConfigError(
            f"recipe key parallel.pipeline: {num_stages} stages need as many layers, and the network has "
            f"{config.num_hidden_layers}"
        )


def layers_of(stage: int, num_stages: int, num_layers: int) -> range:
    """The layers of a stage; the first stages have one more where they do not go round."""
    size, more = divmod(num_layers, num_stages)
    first = stage * size + min(stage, more)
    return range(first, first + size + (stage < more))


def cut(network: Any, stage: int, num_stages: int) -> None:
    """Leave to a network its stage: the layers, with the embeddings if it is the first, with the head if the last.

    The last stage keeps the embeddings too where the head has the same weight, which so keeps its name.
    """
    kept = network.get_input_embeddings() if stage == num_stages - 1 and is_tied(network) else None
    modules = list(network.named_modules())
    place, path, layers = next(
        (place, path, module)
        for place, (path, module) in enumerate(modules)
        if isinstance(module, torch.nn.ModuleList) and len(module) == network.config.num_hidden_layers
    )
    gone: tuple[str, ...] = (f"{path}.",)
    for number, (name, module) in enumerate(modules):
        is_foreign = stage > 0 if number < place else stage < num_stages - 1
        does_something = isinstance(module, torch.nn.Dropout) or any(True for _ in module.parameters(recurse=False))
        if is_foreign and does_something and module is not kept and not name.startswith(gone):
            stand_in = _NoEmbedding() if isinstance(module, torch.nn.Embedding) else _Nothing()
            network.set_submodule(name, stand_in)
            gone += (f"{name}.",)  # with all within
    for index in set(range(len(layers))) - set(layers_of(stage, num_stages, len(layers))):
        layers[index] = _NoLayer()


def is_tied(network: Any) -> bool:
    """Whether the head has the embeddings' weight."""
    return network.get_output_embeddings().weight is network.get_input_embeddings().weight


class _NoLayer(torch.nn.Module):
    """In the place of another stage's layer."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states


class _Nothing(torch.nn.Identity):
    """In the place of what stands between embeddings and layers, or behind them."""

    decoder = None  # transformers looks for the head's matrix under this name


class _NoEmbedding(torch.nn.Module):
    """In the place of an embedding that the first stage has added: nothing more is added."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(ids).unsqueeze(-1)  # [B, L, 1]


class Stage(torch.nn.Module):
    """A cut network: from a batch, or from hidden states [B, L, H] and the rest of it, to hidden states or logits."""

    def __init__(
        self,
        network: Any,
        inputs: Callable[[Tensors], dict[str, Any]],
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        super().__init__()
        self.network, self._inputs, self._precision = network, inputs, precision

    def forward(self, *received: torch.Tensor, **batch: torch.Tensor) -> torch.Tensor:
        inputs = self._inputs(batch)
        if received:
            del inputs["input_ids"]
            inputs["inputs_embeds"] = received[0]
        with self._precision():
            found: torch.Tensor = self.network(**inputs).logits
        return found.float()  # what the next stage has room for


class Pipeline:
    """This process's stage of a network, and the passes through all stages.

    `inputs` makes of a batch what the network is called with, under `precision`.

    Attributes:
        model: what the network has become, on its device and with its copies.
    """

    def __init__(
        self,
        network: Any,
        inputs: Callable[[Tensors], dict[str, Any]],
        mesh: Mesh,
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        check_cut(network.config, mesh.num_stages)
        self._mesh, self._group, self._width = mesh, mesh.group("pipeline"), network.config.hidden_size
        self._is_last = mesh.stage == mesh.num_stages - 1
        self._shared_weight: torch.nn.Parameter | None = None
        self._ends: Any = None  # the first and the last stage of this pipeline
        if is_tied(network):
            ends = zip(mesh.stage_ranks(0), mesh.stage_ranks(mesh.num_stages - 1), strict=True)
            self._ends, _ = distributed.new_subgroups_by_enumeration([list(pair) for pair in ends])
            if mesh.stage == 0 or self._is_last:
                self._shared_weight = network.get_input_embeddings().weight
        cut(network, mesh.stage, mesh.num_stages)
        self.model = mesh.distribute(Stage(network, inputs, precision))
        self._schedules: dict[bool, tuple[tuple[int, ...], PipelineStage, Schedule1F1B | ScheduleGPipe]] = {}
        self._factor = 1.0

    def gradients(self, batches: list[Batch], factor: float) -> float:
        """Add the gradients of `factor` times the passes' losses to the weights; returns the sum of losses."""
        joined = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        total = self._run(joined, len(batches[0]["labels"]), factor, is_training=True)
        if self._shared_weight is not None:
            distributed.all_reduce(self._shared_weight.grad, group=self._ends)
        return total

    def loss(self, batch: Batch) -> float:
        """The sum of losses of a batch, which goes through in as many passes as there are stages, given the rows."""
        size = math.ceil(len(batch["labels"]) / self._mesh.num_stages)
        return self._run(batch, size, 1.0, is_training=False)

    def whole_norm(self, norm: torch.Tensor) -> torch.Tensor:
        """The norm of all stages' gradients, from that of this one's."""
        square = norm.double() ** 2
        if self._is_last and self._shared_weight is not None:  # which the first stage counts
            square = (square - torch.linalg.vector_norm(self._shared_weight.grad).double() ** 2).clamp(min=0)
        distributed.all_reduce(square, group=self._group)
        return square.sqrt().to(norm.dtype)

    def gather(self, weights: Tensors) -> Tensors:
        """The weights of all stages on the first process, from those of each, on CPUs; empty on the others."""
        if self._mesh.is_first:
            for stage in range(1, self._mesh.num_stages):
                source, kinds = self._mesh.stage_ranks(stage)[0], list[Any]([None])
                distributed.recv_object_list(kinds, src=source)
                for name, (shape, dtype) in kinds[0].items():
                    weights[name] = torch.empty(shape, dtype=dtype)
                    distributed.recv(weights[name], src=source)
            return weights
        if self._mesh.is_first_of_stage:
            distributed.send_object_list([{name: (item.shape, item.dtype) for name, item in weights.items()}], dst=0)
            for item in weights.values():
                distributed.send(item, dst=0)
        return {}

    def _run(self, batch: Batch, size: int, factor: float, is_training: bool) -> float:
        """Take a batch through all stages, `size` rows in a pass; the sum of its losses, on every stage."""
        rows, length = batch["labels"].shape
        num_passes = math.ceil(rows / size)
        filled = _filled(batch, num_passes * size)
        tensors = {name: torch.from_numpy(values).to(self._mesh.device) for name, values in filled.items()}
        stage, schedule = self._schedule((size, length, num_passes), is_training)
        self._factor = factor
        losses: list[torch.Tensor] = []
        run: Any = schedule.step if is_training else schedule.eval
        run(target=tensors["labels"], losses=losses, return_outputs=False, **tensors)
        stage.clear_runtime_states()
        total = torch.zeros(1, dtype=torch.float64, device=self._mesh.device)
        if self._is_last:
            total += torch.stack(losses).detach().double().sum() / factor
        distributed.broadcast(total, group=self._group, group_src=self._mesh.num_stages - 1)
        return float(total)

    def _schedule(
        self, shape: tuple[int, int, int], is_training: bool
    ) -> tuple[PipelineStage, Schedule1F1B | ScheduleGPipe]:
        """torch's part, for (rows of a pass, their length, passes); it holds room for all their hidden states."""
        mesh, (size, length, num_passes) = self._mesh, shape
        if self._schedules.get(is_training, ((),))[0] != shape:
            self._schedules.pop(is_training, None)  # its room, before more is taken
            hidden = torch.empty(size, length, self._width, device="meta", requires_grad=True)
            stage = PipelineStage(
                self.model,
                mesh.stage,
                mesh.num_stages,
                mesh.device,
                input_args=(hidden,) if mesh.stage else (),
                output_args=(hidden,),
                group=self._group,
            )
            kind = Schedule1F1B if num_passes >= mesh.num_stages else ScheduleGPipe
            schedule = kind(stage, num_passes, loss_fn=self._scaled_loss, scale_grads=False)
            self._schedules[is_training] = shape, stage, schedule
        return self._schedules[is_training][1:]

    def _scaled_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return label_loss(logits, labels) * self._factor


def _filled(batch: Batch, num_rows: int) -> Batch:
    """A batch with its last row repeated, without labels, up to `num_rows`: all passes of a pipeline have one shape."""
    more = num_rows - len(batch["labels"])
    filled = {
        name: np.pad(values, [(0, more)] + [(0, 0)] * (values.ndim - 1), mode="edge") for name, values in batch.items()
    }
    filled["labels"][len(batch["labels"]) :] = IGNORED
    return filled
