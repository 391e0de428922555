"""What a preparation did: documents and bytes per rule, examples of what was dropped, lengths, languages.

Counted per part (in the process that reads it) and added up at the end; written as report.json and as one HTML page
with its plots inside.
"""

from __future__ import annotations

import dataclasses
import html
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastserve.core.config import format_bytes

_EXAMPLES = 3  # per rule
_EXAMPLE_CHARACTERS = 300


@dataclass(slots=True)
class PartCounts:
    """Counts of one part of the input; `lengths` has document counts by the power of two below their words."""

    documents_in: int = 0
    bytes_in: int = 0
    documents_out: int = 0
    bytes_out: int = 0
    dropped_documents: dict[str, int] = field(default_factory=dict)
    dropped_bytes: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    languages: dict[str, int] = field(default_factory=dict)
    repaired_documents: int = 0

    @classmethod
    def read(cls, path: Path) -> PartCounts:
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def add(self, raw: str, text: str, rule: str, num_words: int, language: str) -> None:
        """Count a document that was read; `rule` drops it unless empty."""
        self.documents_in += 1
        self.bytes_in += len(raw.encode(errors="replace"))
        self.documents_out += 1
        self.bytes_out += len(text.encode(errors="replace"))
        self.repaired_documents += text != raw.strip()
        if rule:
            self.drop_later(text, rule)
            return
        length = str(1 << max(0, num_words.bit_length() - 1))
        self.lengths[length] = self.lengths.get(length, 0) + 1
        if language:
            self.languages[language] = self.languages.get(language, 0) + 1

    def drop_later(self, text: str, rule: str) -> None:
        """Take back a document that was counted as staying."""
        size = len(text.encode(errors="replace"))
        self.documents_out -= 1
        self.bytes_out -= size
        self.dropped_documents[rule] = self.dropped_documents.get(rule, 0) + 1
        self.dropped_bytes[rule] = self.dropped_bytes.get(rule, 0) + size
        examples = self.examples.setdefault(rule, [])
        if len(examples) < _EXAMPLES:
            examples.append(text[:_EXAMPLE_CHARACTERS])


def write_report(out: Path, inputs: list[str], settings: dict[str, Any]) -> None:
    """Add up OUT/parts/*.final.json into OUT/report.html and, last, OUT/report.json."""
    total = _sum([PartCounts.read(path) for path in sorted((out / "parts").glob("*.final.json"))])
    report = {"inputs": inputs, "settings": settings, **total.as_dict()}
    (out / "report.html").write_text(_page(report), encoding="utf-8")
    (out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), encoding="utf-8")


def _sum(parts: list[PartCounts]) -> PartCounts:
    total = PartCounts()
    for item in dataclasses.fields(PartCounts):
        values = [getattr(part, item.name) for part in parts]
        if item.name == "examples":
            for examples in values:
                for rule, texts in examples.items():
                    total.examples[rule] = (total.examples.get(rule, []) + texts)[:_EXAMPLES]
        elif values and isinstance(values[0], dict):
            setattr(total, item.name, dict(sum(map(Counter, values), Counter[str]()).most_common()))
        else:
            setattr(total, item.name, sum(values))
    return total


def _page(report: dict[str, Any]) -> str:
    """One HTML page that needs nothing from elsewhere; every text of the corpus is escaped."""
    rows = "".join(
        f"<tr><td>{html.escape(rule)}</td><td>{count:,}</td><td>{format_bytes(report['dropped_bytes'][rule])}</td></tr>"
        for rule, count in report["dropped_documents"].items()
    )
    examples = "".join(
        f"<h3>{html.escape(rule)}</h3>" + "".join(f"<pre>{html.escape(text)}</pre>" for text in texts)
        for rule, texts in report["examples"].items()
    )
    lengths = dict(sorted(report["lengths"].items(), key=lambda item: int(item[0])))
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Data report</title>
<style>body{{font:15px sans-serif;max-width:60em;margin:2em auto}}td,th{{padding:.2em 1em;text-align:left}}
pre{{background:#f3f4f6;padding:.5em;white-space:pre-wrap}}</style>
<h1>Data report</h1>
<p>{report["documents_in"]:,} documents ({format_bytes(report["bytes_in"])}) in,
{report["documents_out"]:,} ({format_bytes(report["bytes_out"])}) out;
{report["repaired_documents"]:,} were changed by repair.</p>
<p>Inputs: {html.escape(", ".join(report["inputs"]))}</p>
<h2>Dropped</h2><table><tr><th>rule</th><th>documents</th><th>bytes</th></tr>{rows}</table>
{bars("Documents dropped by rule", report["dropped_documents"])}
{bars("Words per document that passed the rules (from a power of two)", lengths)}
{bars("Languages", dict(list(report["languages"].items())[:15]))}
<h2>Examples of what was dropped</h2>{examples}</html>
"""


def bars(title: str, counts: dict[str, int]) -> str:
    """A horizontal bar chart as inline SVG."""
    if not counts:
        return ""
    largest, height = max(counts.values()), 22 * len(counts)
    parts = [
        f'<h2>{html.escape(title)}</h2><svg width="720" height="{height}" font-family="sans-serif" font-size="12">'
    ]
    for row, (name, count) in enumerate(counts.items()):
        width = 440 * count / largest if largest else 0
        parts.append(
            f'<text x="150" y="{22 * row + 15}" text-anchor="end">{html.escape(name)}</text>'
            f'<rect x="160" y="{22 * row + 3}" width="{width:.1f}" height="16" fill="#2563eb"/>'
            f'<text x="{166 + width:.1f}" y="{22 * row + 15}">{count:,}</text>'
        )
    return "\n".join([*parts, "</svg>"])
