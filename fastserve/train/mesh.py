"""The processes of a run and how they share a network: stages, copies (DDP), shards (FSDP2), parts of matrices.

One object answers all that the loop asks of its neighbours, for one process as for many. Ranks come from torchrun's
variables, read in `Mesh.start` and nowhere else.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fastserve.core.errors import ConfigError
from fastserve.train.settings import ParallelSection

if TYPE_CHECKING:
    import torch

# Styles of transformers' tensor plans.
_COLUMNS, _ROWS, _REDUCED = "colwise", "rowwise", "replicated_with_grad_allreduce"
_TIMEOUT = timedelta(minutes=30)


class Mesh:
    """The run's processes.

    Attributes:
        rank, num_processes: this process among all.
        data_rank, data_size: its share of every batch; processes of one tensor group or pipeline read the same share.
        stage, num_stages: its place in a pipeline (`pipeline.py`); the processes of a stage stand side by side.
    """

    def __init__(self, section: ParallelSection, rank: int, num_processes: int) -> None:
        if section.num_processes != num_processes:
            raise ConfigError(
                f"recipe section [parallel]: pipeline {section.pipeline}, data {section.data}, shard {section.shard}, "
                f"tensor {section.tensor} make {section.num_processes} processes, not {num_processes}: give --nproc "
                f"{section.num_processes}"
            )
        self._section, self.rank, self.num_processes = section, rank, num_processes
        self.data_size, self.num_stages = section.data * section.shard, section.pipeline
        self.stage, self._place = divmod(rank, num_processes // section.pipeline)
        self.data_rank = self._place // section.tensor
        self._device_mesh: Any = None
        self._reduced: list[Any] = []
        self._wrapped: Any = None

    @classmethod
    def start(cls, section: ParallelSection | None) -> Mesh:
        """Join the process group of torchrun's variables, if there are any; without a section all hold copies."""
        import torch

        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        section = section or ParallelSection(data=size)
        mesh = cls(section, rank, size)
        if size > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            if not torch.distributed.is_initialized():  # Ray Train does it before
                torch.distributed.init_process_group(backend, timeout=_TIMEOUT)
            mesh._device_mesh = torch.distributed.device_mesh.init_device_mesh(
                mesh.device.type,
                (section.pipeline, section.data, section.shard, section.tensor),
                mesh_dim_names=("pipeline", "data", "shard", "tensor"),
            )
        return mesh

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_first_of_stage(self) -> bool:
        return self._place == 0

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def group(self, dimension: str) -> Any:
        """This process's group along a dimension of the mesh."""
        return self._device_mesh[dimension].get_group()

    def stage_ranks(self, stage: int) -> range:
        """The processes of a stage: one of each pipeline."""
        size = self.num_processes // self.num_stages
        return range(stage * size, (stage + 1) * size)

    def distribute(self, network: Any) -> Any:
        """Put the network's weights where they belong; returns what to call in its place."""
        import torch

        network.to(self.device)
        self._wrapped = network
        if self._section.tensor > 1:
            self._split_matrices(network)
        if self._section.shard > 1:
            self._shard(network)
        elif self._section.data > 1:
            device_ids = [self.device.index] if self.device.type == "cuda" else None
            self._wrapped = torch.nn.parallel.DistributedDataParallel(
                network,
                device_ids=device_ids,
                process_group=self.group("data"),
                find_unused_parameters=self._has_unused(network),
            )
        return self._wrapped

    @contextlib.contextmanager
    def accumulating(self, is_last: bool) -> Iterator[None]:
        """Around the passes of a step: gradients are exchanged with the last."""
        if is_last or self.num_processes == 1:
            if hasattr(self._wrapped, "set_requires_gradient_sync"):
                self._wrapped.set_requires_gradient_sync(True)
            yield
        elif hasattr(self._wrapped, "set_requires_gradient_sync"):
            self._wrapped.set_requires_gradient_sync(False)
            yield
        elif hasattr(self._wrapped, "no_sync"):
            with self._wrapped.no_sync():
                yield
        else:
            yield

    def finish_gradients(self) -> None:
        """Add up what tensor parallelism leaves in parts: the gradients of norms inside the split region."""
        import torch

        for parameter in self._reduced:
            gradient = parameter.grad
            if gradient is not None:
                local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
                torch.distributed.all_reduce(local, group=self.group("tensor"))

    def sum_over_data(self, value: float) -> float:
        """The sum over the processes that share a batch."""
        import torch

        if self.data_size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64)
        torch.distributed.all_reduce(total)
        return float(total) / (self._section.tensor * self.num_stages)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on one of the processes."""
        import torch

        if self.num_processes == 1:
            return flag
        number = torch.tensor([float(flag)])
        torch.distributed.all_reduce(number)
        return bool(number)

    def wait(self) -> None:
        """Until every process is here."""
        self.any(False)

    def close(self) -> None:
        import torch

        if self.num_processes > 1:
            torch.distributed.destroy_process_group()

    def _split_matrices(self, network: Any) -> None:
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        plan = check_tensor_plan(network.config, self._section.tensor)
        prefix = network.base_model_prefix
        styles = {_COLUMNS: ColwiseParallel, _ROWS: RowwiseParallel}
        chosen = {f"{prefix}.{name}": styles[style]() for name, style in plan.items() if style in styles}
        reduced = [f"{prefix}.{name}.*" for name, style in plan.items() if style == _REDUCED]
        parallelize_module(network, self._device_mesh["tensor"], chosen)
        names = [
            name for name, _ in network.named_parameters() if any(fnmatch.fnmatch(name, pattern) for pattern in reduced)
        ]
        self._reduced = [parameter for name, parameter in network.named_parameters() if name in names]

    def _shard(self, network: Any) -> None:
        from torch.distributed.fsdp import fully_shard

        dimensions = ("data", "shard") if self._section.data > 1 else "shard"
        mesh = self._device_mesh[dimensions]
        names = {
            name for name, parameter in network.named_parameters() if any(parameter is item for item in self._reduced)
        }
        for block in blocks_of(network):
            fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh)
        self._reduced = [parameter for name, parameter in network.named_parameters() if name in names]

    @staticmethod
    def _has_unused(network: Any) -> bool:
        """Whether a loss leaves weights without gradient (a pooler that no head reads)."""
        return any("pooler" in name for name, _ in network.named_parameters())


def check_tensor_plan(config: Any, size: int) -> dict[str, str]:
    """transformers' tensor plan of a network; ConfigError if it has none that we can follow, or `size` does not fit."""
    plan = dict(config.base_model_tp_plan or {})
    if not plan or set(plan.values()) - {_COLUMNS, _ROWS, _REDUCED}:
        raise ConfigError(
            f"recipe key parallel.tensor: networks of type {config.model_type!r} cannot be split so; use data or shard"
        )
    if config.num_key_value_heads % size:
        raise ConfigError(
            f"recipe key parallel.tensor: {size} does not divide the {config.num_key_value_heads} key-value heads"
        )
    return plan


def blocks_of(network: Any) -> list[Any]:
    """The repeated layers of a network: the members of its longest module lists."""
    import torch

    lists = [module for module in network.modules() if isinstance(module, torch.nn.ModuleList) and len(module) > 1]
    longest = max(map(len, lists), default=0)
    return [block for blocks in lists if len(blocks) == longest for block in blocks]
