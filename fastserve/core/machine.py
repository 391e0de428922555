"""What this process may use of its machine: processors and memory, cut to the limits of its control group."""

from __future__ import annotations

import math
import os
from pathlib import Path

from fastserve.core.errors import MemoryPlanError

_CGROUP = Path("/sys/fs/cgroup")


def usable_cpus() -> list[int]:
    """The processors that this process may run on, cut to its control group's quota (rounded up)."""
    if hasattr(os, "sched_getaffinity"):
        cpus = sorted(os.sched_getaffinity(0))
    else:
        cpus = list(range(os.cpu_count() or 1))
    quota = cgroup_quota()
    return cpus[: max(1, math.ceil(quota))] if quota else cpus


def cgroup_quota(root: Path = _CGROUP) -> float:
    """Processors that the control group grants, by version 2 then version 1; 0 when there is no limit."""
    try:
        limit, period = (root / "cpu.max").read_text().split()
        return 0.0 if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    try:
        limit_us = int((root / "cpu" / "cpu.cfs_quota_us").read_text())
        return max(0.0, limit_us / int((root / "cpu" / "cpu.cfs_period_us").read_text()))
    except (OSError, ValueError):
        return 0.0


def free_host_memory() -> int:
    """Bytes that this process may still take.

    Raises:
        MemoryPlanError: the system does not say.
    """
    free = _meminfo("MemAvailable")
    limit, used = _read_int(_CGROUP / "memory.max"), _read_int(_CGROUP / "memory.current")
    if limit is not None and used is not None:
        free = min(free, max(0, limit - used))
    return free


def _meminfo(field: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise MemoryPlanError("cannot tell how much memory is free here; set kv_cache_memory")


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
