"""The page of a trained folder for people: README.md with what was measured, and the curves of its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastserve.core.errors import ConfigError
from fastserve.train.chart import loss_chart, read_curves

PICTURE = "training.svg"


def write_card_page(folder: Path, log: Path, card: dict[str, Any], stage: str = "pretrain") -> None:
    """Add README.md and the picture to a model folder; the log may be missing or short."""
    picture = ""
    try:
        with open(log, encoding="utf-8") as lines:
            (folder / PICTURE).write_text(loss_chart(read_curves(lines, stage)), encoding="utf-8")
        picture = f"\n![Loss over tokens]({PICTURE})\n"
    except (ConfigError, FileNotFoundError):
        pass
    measured = "".join(
        f"| {name.replace('_', ' ')} | {value} |\n"
        for name, value in card["measured"].items()
        if isinstance(value, int | float)
    )
    samples = "".join(
        f"\n**{prompt}** {answer}\n" for prompt, answer in (card["measured"].get("samples") or {}).items()
    )
    text = (
        f"# {card['name']}\n\n{card['parameters'] / 1e6:.1f} M parameters, trained by {card['made_by']}: step "
        f"{card['step']:,}. How: `fastserve.json`.\n\n| measured | |\n|---|---|\n{measured}{picture}{samples}"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
