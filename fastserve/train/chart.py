"""`python -m fastserve.train.chart LOG SVG`: draw the losses of a training log as an SVG.

The log holds the JSON lines of a run.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fastserve.core.errors import ConfigError

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 360, 56, 16, 24, 48
_CURVES = (("loss", "#2563eb", "training batches"), ("held_out_loss", "#dc2626", "held-out books"))
Curve = list[tuple[int, float]]  # tokens seen, loss


@dataclass(frozen=True, slots=True)
class _Axes:
    most_tokens: int
    low: float
    high: float

    def x(self, tokens: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * tokens / self.most_tokens

    def y(self, loss: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (self.high - loss) / (self.high - self.low)


def read_curves(lines: Iterable[str], stage: str) -> dict[str, Curve]:
    """The curves of a stage; a step's last report counts. ConfigError if there is none."""
    tokens: dict[int, int] = {}
    seen = 0
    losses: dict[str, dict[int, float]] = {key: {} for key, _, _ in _CURVES}
    for line in lines:
        try:
            report = json.loads(line) if line.startswith("{") else {}
        except ValueError:  # a line that a kill cut short
            continue
        if report.get("stage") == stage:
            step = report["step"]
            seen = tokens[step] = report.get("tokens", seen)
            for key in losses.keys() & report.keys():
                losses[key][step] = report[key]
    if not losses["loss"]:
        raise ConfigError(f"the log has no report of the stage {stage!r}")
    return {key: [(tokens[step], loss) for step, loss in sorted(found.items())] for key, found in losses.items()}


def loss_chart(curves: dict[str, Curve]) -> str:
    """An SVG of loss per token over tokens seen."""
    points = [point for curve in curves.values() for point in curve]
    losses = [loss for _, loss in points]
    axes = _Axes(max(tokens for tokens, _ in points), math.floor(min(losses) * 2) / 2, math.ceil(max(losses) * 2) / 2)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif">'
    parts = [head, f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>', *_grid(axes)]
    for row, (key, colour, label) in enumerate(_CURVES):
        line = " ".join(f"{axes.x(tokens):.1f},{axes.y(loss):.1f}" for tokens, loss in curves[key])
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(_text(_WIDTH - 24, _TOP + 16 + 18 * row, label, "end", colour))
    return "\n".join([*parts, "</svg>", ""])


def _grid(axes: _Axes) -> list[str]:
    parts = [_text(_LEFT, 14, "loss per token (nats)", "start"), _text(_WIDTH // 2, _HEIGHT - 8, "tokens", "middle")]
    for half in range(int(axes.low * 2), int(axes.high * 2) + 1):
        y = axes.y(half / 2)
        parts.append(f'<path d="M{_LEFT},{y:.1f}H{_WIDTH - _RIGHT}" stroke="#e5e7eb"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{half / 2:.1f}", "end"))
    for millions in range(0, axes.most_tokens // 1_000_000 + 1, 2):
        parts.append(_text(axes.x(millions * 1e6), _HEIGHT - 28, f"{millions} M", "middle"))
    return parts


def _text(x: float, y: float, text: str, anchor: str, colour: str = "#374151") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" fill="{colour}" text-anchor="{anchor}">{text}</text>'


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m fastserve.train.chart LOG SVG")
    log, picture = map(Path, sys.argv[1:])
    picture.write_text(
        loss_chart(read_curves(log.read_text(encoding="utf-8").splitlines(), "pretrain")), encoding="utf-8"
    )
