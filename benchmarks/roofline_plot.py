"""The roofline plot of cpu_roofline.py's operations: rate over operations per byte, under the machine's two limits."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

COLOURS = {"bf16": "tab:blue", "int8": "tab:orange", "int4": "tab:green"}


def operations(metrics: Mapping[str, float]) -> dict[tuple[str, str], dict[str, float]]:
    """(precision, operation) -> figures, from keys such as ops.bf16.qkv.rows1.share."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for key, value in metrics.items():
        if key.startswith("ops."):
            _, precision, rest = key.split(".", 2)
            name, figure = rest.rsplit(".", 1)
            found.setdefault((precision, name), {})[figure] = value
    return found


def draw(metrics: Mapping[str, float], file: Path) -> None:
    """Left: operations with multiply-adds on the roofline. Right: every operation's share of its limit."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fastserve"
    from matplotlib import pyplot

    found = operations(metrics)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 6.5), width_ratios=(3, 2), layout="constrained")
    for precision, colour in COLOURS.items():
        chosen = {name: figures for (one, name), figures in found.items() if one == precision and figures["gop_s"]}
        if not chosen:
            continue
        peak = statistics.median(figures["peak_gop_s"] for figures in chosen.values())
        read = statistics.median(figures["read_limit_gb_s"] for figures in chosen.values())
        intensities = [0.5, peak / read, 1000]
        left.plot(intensities, [min(peak, read * value) for value in intensities], color=colour, linewidth=1)
        for name, figures in chosen.items():
            point = figures["operations_per_byte"], figures["gop_s"]
            left.scatter(*point, color=colour, s=18)
            left.annotate(name, point, fontsize=6, xytext=(3, -7), textcoords="offset points")
        left.plot([], [], color=colour, label=precision)
    left.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="Gop/s", title="Roofline")
    left.legend()
    labels = [f"{name} ({precision})" for precision, name in found]
    colours = [COLOURS[precision] for precision, _ in found]
    right.barh(labels, [figures["share"] for figures in found.values()], color=colours)
    right.axvline(1.0, color="black", linewidth=0.8)
    right.invert_yaxis()
    right.tick_params(axis="y", labelsize=7)
    right.set(title="Share of the limit measured beside it")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
