"""How many threads, and where: what the process may really use, not what the machine has."""

from __future__ import annotations

import math
import os
from pathlib import Path

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
