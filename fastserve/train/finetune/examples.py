"""Read examples from JSON lines, JSON, CSV, TSV, Parquet or SQuAD's JSON, and divide them."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastserve.core.errors import ConfigError

Example = dict[str, Any]
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def read_examples(path: Path) -> list[Example]:
    """All rows of a file as dictionaries; the first line of CSV and TSV names the columns. ConfigError without rows."""
    if not path.exists():
        raise ConfigError(f"there is no file {path}")
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"{path} must be a file that ends in {', '.join(_SUFFIXES)}")
    try:
        rows = list(_rows(path))
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not rows:
        raise ConfigError(f"{path} has no examples")
    for row in rows:
        if not isinstance(row, dict):
            raise ConfigError(f"{path}: an example must be a JSON object with keys, not {row!r:.60}")
    return rows


def divide(rows: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, validation), at least one each, in an order of the seed. ConfigError with one example."""
    if len(rows) < 2:
        raise ConfigError("one example cannot be divided; give more, or a validation file")
    order = random.Random(seed).sample(rows, len(rows))
    size = min(len(rows) - 1, max(1, round(share * len(rows))))
    return order[size:], order[:size]


def value_of(row: Example, key: str) -> Any:
    """row[key]; ConfigError where it is missing or null."""
    if key not in row:
        raise ConfigError(f"an example has no {key!r}; it has {', '.join(map(str, row))}")
    if row[key] is None:
        raise ConfigError(f"an example has null under {key!r}; fill it in, or leave the example out")
    return row[key]


def _rows(path: Path) -> Iterator[Any]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(path).to_pylist()
        return
    with open(path, encoding="utf-8-sig", newline="") as file:
        if suffix == ".jsonl":
            for line in file:
                if line.strip():
                    yield json.loads(line)
        elif suffix == ".json":
            value = json.load(file)
            rows = value["data"] if isinstance(value, dict) and "data" in value else value
            for row in rows if isinstance(rows, list) else [rows]:
                yield from _squad(row) if isinstance(row, dict) and "paragraphs" in row else [row]
        else:
            table = csv.DictReader(file, delimiter="," if suffix == ".csv" else "\t")
            for row in table:
                if None in row or None in row.values():
                    raise ConfigError(
                        f"line {table.line_num} has not the columns of the first; quote texts with commas"
                    )
                yield row


def _squad(article: dict[str, Any]) -> Iterator[Example]:
    """A row per question, with its context and all answers."""
    for paragraph in article["paragraphs"]:
        for question in value_of(paragraph, "qas"):
            answers = question.get("answers", [])
            yield {
                "id": question.get("id"),
                "question": value_of(question, "question"),
                "context": value_of(paragraph, "context"),
                "answers": {
                    "text": [value_of(answer, "text") for answer in answers],
                    "answer_start": [value_of(answer, "answer_start") for answer in answers],
                },
            }
