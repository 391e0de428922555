"""Pictures of a policy comparison: latency against load, the queue over time, what steps are made of.

Each as a PNG, and all of them in one HTML file that needs nothing else (the pictures are inside it). Needs
matplotlib, which only developers of FastServe have installed already.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastserve.bench.simulate import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIZE = (8.0, 4.5)  # inches
_BINS = 200  # points in time that a run is cut into
_FIGURES = (("mean_normalised_latency", "s per output token"), ("mean_ttft", "s to the first token"), ("p99_e2e", "s"))

Sweep = Mapping[float, Mapping[str, Mapping[str, float]]]  # load -> policy -> figure -> value


def draw(folder: Path, title: str, sweep: Sweep, runs: Mapping[str, Run]) -> list[Path]:
    """Write the pictures and `policies.html` into `folder`; returns the files.

    Args:
        sweep: figures of `latencies.summarise` by load and policy.
        runs: recorded runs by policy, at one load.
    """
    figures = {f"{name}_against_load": against_load(sweep, name, unit) for name, unit in _FIGURES}
    figures["queue_over_time"] = queue_over_time(runs)
    figures |= {f"steps_over_time_{name}": steps_over_time(name, run) for name, run in runs.items()}
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    parts = [f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><h1>{html.escape(title)}</h1>"]
    for name, figure in figures.items():
        png = _png(figure)
        files.append(folder / f"{name}.png")
        files[-1].write_bytes(png)
        caption = html.escape(name.replace("_", " "))
        picture = base64.b64encode(png).decode()
        parts.append(f"<h2>{caption}</h2><img alt='{caption}' src='data:image/png;base64,{picture}'>")
    files.append(folder / "policies.html")
    files[-1].write_text("\n".join(parts), encoding="utf-8")
    return files


def against_load(sweep: Sweep, figure_name: str, unit: str) -> Figure:
    """One figure against load, a line per policy; the vertical axis is logarithmic."""
    figure, axes = _figure(f"{figure_name.replace('_', ' ')} ({unit})", "load (share of capacity)")
    loads = sorted(sweep)
    for policy in sweep[loads[0]]:
        values = [sweep[load][policy][figure_name] for load in loads]
        axes.plot(loads, values, marker="o", label=policy)
    axes.set_yscale("log")
    axes.legend(fontsize="small")
    return figure


def queue_over_time(runs: Mapping[str, Run]) -> Figure:
    """Sequences that wait, a line per policy."""
    figure, axes = _figure("sequences waiting", "time (s)")
    for policy, run in runs.items():
        times = [time for time, _, _ in run.queue_lengths]
        axes.plot(times, [waiting for _, _, waiting in run.queue_lengths], label=policy, linewidth=1)
    axes.legend(fontsize="small")
    return figure


def steps_over_time(policy: str, run: Run) -> Figure:
    """Tokens per second in prefills and decodes, stacked."""
    figure, axes = _figure(f"tokens per second, {policy}", "time (s)")
    times, prefill, decode = _binned(run.steps)
    axes.stackplot(times, decode, prefill, labels=["decode", "prefill"])
    axes.legend(fontsize="small", loc="upper right")
    return figure


def _binned(steps: Sequence[tuple[float, int, int]]) -> tuple[list[float], list[float], list[float]]:
    width = steps[-1][0] / _BINS
    prefill, decode = [0.0] * _BINS, [0.0] * _BINS
    for time, prefill_tokens, decodes in steps:
        place = min(_BINS - 1, int(time / width))
        prefill[place] += prefill_tokens / width
        decode[place] += decodes / width
    return [(place + 0.5) * width for place in range(_BINS)], prefill, decode


def _figure(vertical: str, horizontal: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(horizontal)
    axes.set_ylabel(vertical)
    axes.grid(alpha=0.3)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
