"""Start the processes of a run on a Ray cluster, by Ray Train, instead of torchrun on each machine.

Ray places the workers, joins them to a process group and starts them again when one is lost; they go on from the last
checkpoint. The recipe, its data and the run must lie under the same paths on all machines.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastserve.core.errors import ConfigError, FastServeError


def launch(recipe: Path, run: Path, num_processes: int, max_restarts: int) -> None:
    """Run a recipe on `num_processes` workers of the cluster to its end.

    ConfigError without Ray; FastServeError when the workers fail more often than allowed.
    """
    try:
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError:
        raise ConfigError("--launcher ray needs Ray Train: pip install 'ray[train]'") from None
    ray.init(ignore_reinit_error=True)
    has_accelerators = ray.cluster_resources().get("GPU", 0) >= num_processes
    trainer = TorchTrainer(
        _work,
        train_loop_config={"recipe": str(recipe), "run": str(run), "folder": os.getcwd()},
        scaling_config=ScalingConfig(num_workers=num_processes, use_gpu=has_accelerators),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=max_restarts)),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray's errors have no class of their own in common
        raise FastServeError(
            f"the workers on Ray failed: {str(error).strip().splitlines()[-1]}; the same command goes on from the last "
            "checkpoint"
        ) from error


def _work(config: dict[str, Any]) -> None:
    """One worker's share; Ray has set torchrun's variables and made the process group."""
    from fastserve.train.worker import work

    os.chdir(config["folder"])  # Ray starts workers in a folder of its own
    work(Path(config["recipe"]), Path(config["run"]))
