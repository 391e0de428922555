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
    try:
        rows = list(_rows(path))
    except (ValueError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not rows:
        raise ConfigError(f"{path} has no examples")
    return rows


def divide(rows: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, validation), at least one each, in an order of the seed. ConfigError with one example."""
    if len(rows) < 2:
        raise ConfigError("one example cannot be divided; give more, or a validation file")
    order = random.Random(seed).sample(rows, len(rows))
    size = min(len(rows) - 1, max(1, round(share * len(rows))))
    return order[size:], order[:size]


def value_of(row: Example, key: str) -> Any:
    """row[key]; ConfigError that names the keys there are."""
    if key not in row:
        raise ConfigError(f"an example has no {key!r}; it has {', '.join(map(str, row))}")
    return row[key]


def _rows(path: Path) -> Iterator[Example]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(path).to_pylist()
        return
    with open(path, encoding="utf-8", newline="") as file:
        if suffix == ".jsonl":
            for line in file:
                if line.strip():
                    yield json.loads(line)
        elif suffix == ".json":
            value = json.load(file)
            yield from _squad(value["data"]) if isinstance(value, dict) and "data" in value else value
        elif suffix in (".csv", ".tsv"):
            for row in csv.DictReader(file, delimiter="," if suffix == ".csv" else "\t"):
                yield dict(row)
        else:
            raise ConfigError(f"{path} must be one of {', '.join(_SUFFIXES)}")


def _squad(articles: list[dict[str, Any]]) -> Iterator[Example]:
    """A row per question, with its context and all answers."""
    for article in articles:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = question.get("answers", [])
                yield {
                    "id": question.get("id"),
                    "question": question["question"],
                    "context": paragraph["context"],
                    "answers": {
                        "text": [answer["text"] for answer in answers],
                        "answer_start": [answer["answer_start"] for answer in answers],
                    },
                }
