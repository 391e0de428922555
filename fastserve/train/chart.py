"""`python -m fastserve.train.chart LOG SVG`: draw the losses of a training log (the JSON lines of a run) as an SVG."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 720, 360, 56, 48, 24
_CURVES = (("loss", "#2563eb", "training batches"), ("held_out_loss", "#dc2626", "held-out books"))


def loss_chart(lines: Iterable[str], stage: str = "pretrain") -> str:
    """An SVG of loss over tokens; where a resumed run repeats a step, its last report counts."""
    points: dict[str, dict[int, float]] = {key: {} for key, _, _ in _CURVES}
    tokens: dict[int, int] = {}
    for line in lines:
        report = json.loads(line) if line.startswith("{") else {}
        if report.get("stage") == stage:
            step = report["step"]
            tokens[step] = report.get("tokens", tokens.get(step, 0))
            for key, values in points.items():
                if key in report:
                    values[step] = report[key]
    if not points["loss"]:
        raise SystemExit(f"the log has no reports of the stage {stage!r}")
    most = max(tokens.values())
    every = [value for values in points.values() for value in values.values()]
    low, high = int(min(every) * 2) / 2, int(max(every) * 2 + 1) / 2

    def place(step: int, value: float) -> str:
        x = _LEFT + (_WIDTH - _LEFT - 16) * tokens[step] / most
        y = _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)
        return f"{x:.1f},{y:.1f}"

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif">']
    parts.append(f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>')
    for index in range(int((high - low) * 2) + 1):
        value = low + index / 2
        y = _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)
        parts.append(f'<path d="M{_LEFT},{y:.1f}H{_WIDTH - 16}" stroke="#e5e7eb"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" font-size="11" text-anchor="end">{value:.1f}</text>')
    for millions in range(0, most // 1_000_000 + 1, 2):
        x = _LEFT + (_WIDTH - _LEFT - 16) * millions * 1e6 / most
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 28}" font-size="11" text-anchor="middle">{millions} M</text>')
    parts.append(f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 8}" font-size="12" text-anchor="middle">tokens</text>')
    parts.append(f'<text x="{_LEFT}" y="14" font-size="12">loss per token (nats)</text>')
    for row, (key, colour, label) in enumerate(_CURVES):
        line = " ".join(place(step, value) for step, value in sorted(points[key].items()))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(
            f'<text x="{_WIDTH - 24}" y="{_TOP + 16 + 18 * row}" font-size="12" fill="{colour}" text-anchor="end">'
        )
        parts.append(f"{label}</text>")
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python -m fastserve.train.chart LOG SVG")
    Path(sys.argv[2]).write_text(
        loss_chart(Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()), encoding="utf-8"
    )
