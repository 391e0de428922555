"""Find documents that hold text of evaluation sets, by common sequences of words; case and punctuation do not count."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.core.errors import ConfigError
from fastserve.train.data.hashing import Hashes, sequence_hashes, word_hashes

_MIN_WORDS = 4  # shorter evaluation texts (`yes`) occur everywhere


class LeakFinder:
    """Sequences of `num_words` words of evaluation texts; a shorter text is looked for as a whole."""

    def __init__(self, texts: Iterator[str], num_words: int) -> None:
        found: dict[int, list[Hashes]] = defaultdict(list)
        for text in texts:
            words = word_hashes(text)
            if len(words) >= _MIN_WORDS:
                length = min(num_words, len(words))
                found[length].append(sequence_hashes(words, length))
        self._sequences = {length: np.unique(np.concatenate(hashes)) for length, hashes in found.items()}

    @classmethod
    def of_files(cls, files: tuple[str, ...], num_words: int) -> LeakFinder:
        """From text (a text per line), JSON lines and JSON (all strings in them), CSV and TSV files."""
        return cls((text for file in files for text in evaluation_texts(Path(file))), num_words)

    def is_leak(self, words: Hashes) -> bool:
        """Whether the document holds a sequence of an evaluation text."""
        for length, known in self._sequences.items():
            if len(words) >= length:
                sequences = sequence_hashes(words, length)
                places = np.searchsorted(known, sequences)
                if (known[np.minimum(places, len(known) - 1)] == sequences).any():
                    return True
        return False


def evaluation_texts(path: Path) -> Iterator[str]:
    """All texts of an evaluation file; ConfigError for a kind that is not known, or a file that cannot be read."""
    suffix = path.suffix.lower()
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if suffix in (".txt", ".text"):
                yield from file
            elif suffix == ".jsonl":
                for line in file:
                    yield from _strings(json.loads(line)) if line.strip() else ()
            elif suffix == ".json":
                yield from _strings(json.load(file))
            elif suffix in (".csv", ".tsv"):
                for row in csv.reader(file, delimiter="," if suffix == ".csv" else "\t"):
                    yield from row
            else:
                raise ConfigError(f"against: {path} must be .txt, .json, .jsonl, .csv or .tsv")
    except ConfigError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        hint = "it must be UTF-8, and what its ending says"
        raise ConfigError(f"against: {path} cannot be read: {error}; {hint}") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
