"""Start the processes of a run on this machine, and start them again when one is lost.

torch's elastic agent watches the processes: when one dies it ends the others and starts all anew, and they go on from
the last checkpoint. Across machines the same module runs under torchrun, which sets the same variables.
"""

from __future__ import annotations

import os
import signal
import sys
import uuid
from pathlib import Path

from fastserve.core.errors import ConfigError, FastServeError

_WORKER = "fastserve.train.worker"
LAUNCHERS = ("local", "ray")


def check(launcher: str) -> None:
    """ConfigError for a launcher that there is not."""
    if launcher not in LAUNCHERS:
        raise ConfigError(f"launcher must be one of {', '.join(LAUNCHERS)}, not {launcher!r}")


def launch(recipe: Path, run: Path, num_processes: int, max_restarts: int, launcher: str = "local") -> None:
    """Run a recipe on several processes to its end, here or on a Ray cluster."""
    if launcher == "ray":
        from fastserve.train import ray_launch

        ray_launch.launch(recipe, run, num_processes, max_restarts)
    else:
        _launch_here(recipe, run, num_processes, max_restarts)


def _launch_here(recipe: Path, run: Path, num_processes: int, max_restarts: int) -> None:
    """Run a recipe on `num_processes` processes to its end.

    FastServeError when they fail more often than allowed. On Ctrl-C they end as one process does, and KeyboardInterrupt
    follows.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # A store of its own for every start: with a shared one, new processes meet the addresses of lost ones.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # Seconds that processes have after Ctrl-C to end their step and to save; a second Ctrl-C ends them at once.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=max_restarts,
        monitor_interval=0.5,
        logs_specs=DefaultLogsSpecs(),
    )
    try:
        elastic_launch(config, sys.executable)("-m", _WORKER, str(recipe), str(run))
    except SignalException as error:
        if error.sigval is signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + error.sigval) from None
    except ChildFailedError as error:
        raise FastServeError(
            f"the run failed {max_restarts + 1} times: {_reason(error)}; see above for the reason; the same "
            "command goes on from the last checkpoint"
        ) from None


def _reason(error: object) -> str:
    return str(getattr(error, "name", "")) and str(error).strip().splitlines()[-1].strip(" =")
