"""What every benchmark prints: a table for people on stderr, one JSON line for programs last on stdout.

The line says what was measured, on what, with which versions and settings, how often, and which limits the machine
had at the time (memory reading speed, matmul peak): on a shared machine only figures of one run compare.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastserve import __version__

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors")
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")


@dataclass(slots=True)
class Report:
    """One benchmark's outcome.

    Attributes:
        name: the benchmark.
        config: its settings, the precision of weights, KV cache and lm_head among them.
        metrics: name -> value; a ratio is how many times better ours is.
        repeats: how many runs each value is the median of, where `runs` does not say; printed are the fewest of `runs`.
        runs: metric -> the single values behind its median.
        limits: what `measure_limits` found, by moment ("before", "after").
        skipped: what could not be measured here, and why.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    repeats: int = 1
    runs: dict[str, list[float]] = field(default_factory=dict)
    limits: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def add_runs(self, metric: str, values: list[float]) -> None:
        """Record `values` and their median."""
        self.runs[metric] = [rounded(value) for value in values]
        self.metrics[metric] = rounded(statistics.median(values))

    def as_dict(self) -> dict[str, Any]:
        """The JSON object, with the machine and the versions filled in."""
        return {
            "name": self.name,
            "commit": commit(),
            "machine": {**describe_machine(), "limits": self.limits},
            "versions": versions(),
            "config": self.config,
            "metrics": self.metrics,
            "repeats": min(map(len, self.runs.values()), default=self.repeats),
            "skipped": self.skipped,
            "runs": self.runs,
        }


def emit(report: Mapping[str, Any]) -> None:
    """Print a report: the table to stderr, the JSON line to stdout."""
    print(table(report), file=sys.stderr, flush=True)
    print(json.dumps(report, ensure_ascii=False), flush=True)


def table(report: Mapping[str, Any]) -> str:
    """The report for people."""
    machine = report["machine"]
    lines = [
        f"{report['name']}  (commit {report['commit']}, {report['repeats']} repeats)",
        f"  {machine['cpu']}, {machine['num_cores']} cores, {machine['memory_gib']} GiB"
        + (f", {machine['gpu']}" if machine.get("gpu") else ""),
    ]
    for moment, limits in machine["limits"].items():
        lines.append(f"  limits {moment}: " + ", ".join(f"{name} {value:g}" for name, value in limits.items()))
    width = max((len(name) for name in report["metrics"]), default=0)
    for name, value in report["metrics"].items():
        single = report["runs"].get(name)
        spread = "  [" + " ".join(f"{run:g}" for run in single) + "]" if single and len(single) > 1 else ""
        lines.append(f"  {name:<{width}}  {value:g}{spread}")
    lines.extend(f"  skipped {name}: {reason}" for name, reason in report["skipped"].items())
    return "\n".join(lines)


def rounded(value: float, digits: int = 5) -> float:
    """`value` with so many significant digits, so that the line stays readable."""
    return float(f"{value:.{digits}g}")


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which `share` (0..1) of `values` lie, between the two nearest ones; nan when there are none."""
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def commit() -> str:
    """The checkout's commit, with -dirty when files differ from it; "unknown" outside a checkout or without git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return result.stdout.strip() or "unknown"


def versions() -> dict[str, str]:
    """Installed versions of what the figures depend on."""
    found = {"python": platform.python_version(), "fastserve": __version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_machine() -> dict[str, Any]:
    """Processor, cores this process may use, instruction sets, memory, system, and GPU if there is one."""
    cpu = _read_cpu()
    flags = set(cpu.get("flags", "").split())
    page_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "num_cores": len(os.sched_getaffinity(0)),
        "instructions": [name for name in _INSTRUCTIONS if name in flags],
        "memory_gib": round(page_bytes / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "gpu": _gpu_name(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _read_cpu() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _gpu_name() -> str | None:
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def measure_limits(megabytes: int = 1024, size: int = 2048) -> dict[str, float]:
    """What the CPU can do at this moment with torch's threads: reading GB/s, and bfloat16 and float32 TFLOP/s.

    Reads `megabytes` MiB of distinct memory; multiplies square matrices of `size`. The best of three.
    """
    import torch

    memory = torch.ones(megabytes * 2**20 // 4)
    limits = {"read_gb_s": rounded(memory.nbytes / _best(memory.sum) / 1e9, 4)}
    for name, dtype in (("bf16_tflop_s", torch.bfloat16), ("fp32_tflop_s", torch.float32)):
        matrix = torch.ones(size, size, dtype=dtype)
        limits[name] = rounded(2 * size**3 / _best(functools.partial(torch.matmul, matrix, matrix)) / 1e12, 4)
    return limits


def _best(work: Callable[[], object], repeats: int = 3) -> float:
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
