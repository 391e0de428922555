"""The report of a compression: the card's figures as text, and with plots as report.html.

Plots are SVG in the page itself: nothing is fetched, nothing is run. What is measured is `evaluate.py` and `run.py`.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from fastserve.checkpoint.folder import ModelFolder
from fastserve.core.config import format_bytes

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: left }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .8em } svg { max-width: 100%; height: auto }
"""


def rows(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of every figure that the card has, for people."""
    found = [("made from", str(card["from"])), ("steps", ", ".join(_name(step["step"]) for step in card["steps"]))]
    before, after = card["bytes"]["original"], card["bytes"]["compressed"]
    found.append(("weights", f"{format_bytes(before)} -> {format_bytes(after)} ({before / after:.2f} times smaller)"))
    if "peak_memory" in card:
        found.append(("peak memory of the work", format_bytes(card["peak_memory"])))
    if "seconds" in card:
        found.append(("time of the work", f"{card['seconds']:.0f} s"))
    if loss := card.get("loss"):
        change = f"{loss['original_perplexity']:.4f} -> {loss['perplexity']:.4f} ({loss['increase']:+.3%})"
        found.append((f"perplexity on {loss['tokens']:,} tokens", change))
        found.append(("KL to the original", f"{loss['kl']:.5f} nats per token"))
        found.append(("same likeliest token", f"{loss['same_top']:.2%}"))
    if task := card.get("task"):
        for name, value in task["original"].items():
            found.append((f"{task['name']}, {name}", f"{value:.4g} -> {task['compressed'][name]:.4g}"))
    if speed := card.get("speed"):
        for name, pair in speed.items():
            found.append((f"{name}, tokens/s", f"{pair['original']:.1f} -> {pair['compressed']:.1f}"))
    return found


def as_text(folder: ModelFolder, card: Mapping[str, Any]) -> str:
    """What the command prints at its end."""
    found = [("folder", str(folder.path)), *rows(card)]
    width = max(len(name) for name, _ in found)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in found)


def page(card: Mapping[str, Any]) -> str:
    """report.html, complete in itself."""
    table = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows(card))
    parts = [f"<h1>{html.escape(str(card['from']))}, compressed</h1><table>{table}</table>"]
    for step in card["steps"]:
        if errors := step.get("layer_errors"):
            parts.append(f"<h2>Error per layer: {html.escape(_name(step['step']))}</h2>{bars(errors)}")
    if variants := card.get("variants"):
        parts.append(f"<h2>All variants tried</h2>{pareto(variants)}{_variant_table(variants)}")
    for sample in card.get("samples", []):
        texts = "".join(f"<h3>{who}</h3><pre>{html.escape(sample[who])}</pre>" for who in ("original", "compressed"))
        parts.append(f"<h2>{html.escape(sample['prompt'])}</h2>{texts}")
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>Compression report</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}{body}</html>\n'


def bars(errors: Mapping[str, float]) -> str:
    """Relative squared errors by layer, on a logarithmic scale from a millionth to one."""
    import math

    lines = []
    for number, (name, error) in enumerate(errors.items()):
        share = max(0.0, 1 + math.log10(max(error, 1e-6)) / 6)
        y = 14 * number
        lines.append(f'<text x="330" y="{y + 10}" text-anchor="end">{html.escape(name)}</text>')
        lines.append(f'<rect x="336" y="{y + 1}" width="{400 * share:.1f}" height="11" fill="#4573a7"/>')
        lines.append(f'<text x="{340 + 400 * share:.1f}" y="{y + 10}">{error:.2g}</text>')
    height = 14 * len(errors) + 4
    return f'<svg viewBox="0 0 800 {height}" width="800" height="{height}" font-size="10">{"".join(lines)}</svg>'


def pareto(variants: Sequence[Mapping[str, Any]]) -> str:
    """Perplexity against size; those that nothing beats in both are filled."""
    sizes = [item["bytes"] for item in variants]
    losses = [item["perplexity"] for item in variants]
    best = front(variants)
    low, high, left, right = min(losses), max(losses), min(sizes), max(sizes)
    marks = []
    for number, (size, loss) in enumerate(zip(sizes, losses, strict=True)):
        x = 60 + 660 * (size - left) / max(1, right - left)
        y = 280 - 250 * (loss - low) / max(1e-9, high - low)
        fill = "#4573a7" if number in best else "none"
        label = html.escape(str(variants[number]["name"]))
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" stroke="#4573a7" fill="{fill}"/>')
        marks.append(f'<text x="{x + 6:.1f}" y="{y - 4:.1f}">{label}</text>')
    axes = '<path d="M50 20V290H780" fill="none" stroke="#888"/><text x="700" y="305">bytes</text>'
    names = f'{axes}<text x="4" y="16">perplexity {low:.3g} to {high:.3g}</text>'
    return f'<svg viewBox="0 0 800 310" width="800" height="310" font-size="11">{names}{"".join(marks)}</svg>'


def front(variants: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers of the variants that no other one beats in size and perplexity."""

    def is_beaten(item: Mapping[str, Any]) -> bool:
        return any(
            other["bytes"] <= item["bytes"]
            and other["perplexity"] <= item["perplexity"]
            and (other["bytes"], other["perplexity"]) != (item["bytes"], item["perplexity"])
            for other in variants
        )

    return [number for number, item in enumerate(variants) if not is_beaten(item)]


def _variant_table(variants: Sequence[Mapping[str, Any]]) -> str:
    lines = "".join(
        f"<tr><td>{html.escape(str(item['name']))}</td><td>{item['bytes']:,}</td><td>{item['perplexity']:.4f}</td></tr>"
        for item in variants
    )
    return f"<table><tr><th>variant</th><th>bytes</th><th>perplexity</th></tr>{lines}</table>"


def _name(step: Mapping[str, Any]) -> str:
    skipped = ("ignore", "symmetric", "search", "observer", "smoothing")
    values = [
        f"{key}={value}"
        for key, value in step.items()
        if key not in ("do", *skipped) and value not in ("", 0, None, [])
    ]
    return f"{step['do']} ({', '.join(values)})"
