"""Read the text files of a recipe into clean documents, hold some back, and keep the easiest.

A document is one chapter, tale or picture book. Old books are brought to one modern form: straight double quotes for
speech, no illustration marks, no footnote marks, no headings in capitals, no editor's notes. Nothing here knows about
tokens.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fastserve.core.errors import ConfigError
from fastserve.train.storyteller.recipe import Data, Source

DOCUMENT_END = "<|endoftext|>"
MIN_DOCUMENT_WORDS = 12

_STRAIGHT = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "--",
        "\u2026": "...",
        "\u00a0": " ",
        "\t": " ",
    }
)
_MARKS = re.compile(r"\[[^\]]{0,80}\]|\{[^}]{0,20}\}|[_*#|~^=]+|\u00d7\s*\d+|\(\d+\)")
_EDITORS_NOTE = re.compile(
    r"(?:Sources?|Parallels?|Remarks?|Variants?|Notes?|Formula|Suggested by|Adapted from)\b[^a-z]{0,3}"
    r"(?:\.--|\.-|:|--| one of| by)",
    re.IGNORECASE,
)
_SPEECH_OPENS = re.compile(r"(?<![\w'])'(?=[A-Z])(?!T(?:is|was|were|will)\b|E[mr]\b)")
_SPEECH_CLOSES = re.compile(r"(?<=[,.!?;-])'(?!\w)")


@dataclass(frozen=True, slots=True)
class Document:
    """One text with what is known of it; `source` is its key in the recipe's data.sources."""

    text: str
    source: str
    title: str = ""
    author: str = ""
    project: str = ""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Training documents by source, the held-out ones, and the sha256 of every file that was read."""

    training: dict[str, list[Document]]
    held_out: dict[str, list[Document]]
    sha256: dict[str, str]


def read_corpus(data: Data, folder: Path, seed: int) -> Corpus:
    """Read, clean and split what the recipe names; `folder` holds the files. ConfigError if one is missing."""
    training: dict[str, list[Document]] = {}
    held_out: dict[str, list[Document]] = {}
    sha256: dict[str, str] = {}
    blocked = _blocked_pattern(data.blocked_words)
    for name, source in data.sources.items():
        documents, sha256[source.file] = _read_source(name, source, folder)
        training[name] = _without_duplicates(
            document for document in documents if not (blocked and blocked.search(document.text))
        )
        if source.kind == "storybooks" and data.held_out_storybooks:
            random.Random(seed).shuffle(training[name])
            held_out[name] = training[name][: data.held_out_storybooks]
            training[name] = training[name][data.held_out_storybooks :]
    held_out["held_out"], sha256[data.held_out] = _read_source("held_out", Source(file=data.held_out), folder)
    easy_words = _common_words(
        [document for name, source in data.sources.items() if source.is_whole for document in training[name]]
    )
    for name, source in data.sources.items():
        if source.keep_easiest_words:
            training[name] = keep_easiest(training[name], easy_words, source.keep_easiest_words)
    return Corpus(training, held_out, sha256)


def clean_text(text: str) -> str:
    """One paragraph per line, plain quotes, no marks of the printed page; headings in capitals are dropped."""
    text = _MARKS.sub("", text.translate(_STRAIGHT)).replace("''", '"')
    if len(_SPEECH_OPENS.findall(text)) > text.count('"'):
        text = _SPEECH_CLOSES.sub('"', _SPEECH_OPENS.sub('"', text))
    paragraphs = (re.sub(r"\s+", " ", line).strip() for line in text.split("\n"))
    paragraphs = (re.sub(r"\s+([,.!?;])(?=\s|$)", r"\1", paragraph) for paragraph in paragraphs)
    return "\n".join(
        paragraph
        for paragraph in paragraphs
        if paragraph and not _is_heading(paragraph) and not _EDITORS_NOTE.match(paragraph)
    )


def keep_easiest(documents: list[Document], easy_words: set[str], max_words: int) -> list[Document]:
    """The documents of the simplest words and shortest sentences, `max_words` words in all, in their first order."""
    ranked = sorted(range(len(documents)), key=lambda index: _difficulty(documents[index].text, easy_words))
    kept, num_words = [], 0
    for index in ranked:
        num_words += len(documents[index].text.split())
        if num_words > max_words:
            break
        kept.append(index)
    return [documents[index] for index in sorted(kept)]


def _read_source(name: str, source: Source, folder: Path) -> tuple[list[Document], str]:
    path = folder / source.file
    if not path.exists():
        raise ConfigError(
            f"training text {path} is missing; give the folder that holds `corpora/` with --data or FASTSERVE_SHARED"
        )
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    if source.kind == "storybooks":
        documents = [
            Document(clean_text(row["text"]), name, row["title"], row["author"], row["project"])
            for row in map(json.loads, text.splitlines())
        ]
    elif source.kind == "text":
        documents = [Document(clean_text(part), name) for part in text.split(DOCUMENT_END)]
    else:
        raise ConfigError(f"recipe key data.sources.{name}.kind: {source.kind!r} is neither 'text' nor 'storybooks'")
    max_words = source.max_words or math.inf
    documents = [document for document in documents if MIN_DOCUMENT_WORDS <= len(document.text.split()) <= max_words]
    return documents, hashlib.sha256(raw).hexdigest()


def _is_heading(paragraph: str) -> bool:
    letters = [character for character in paragraph if character.isalpha()]
    return not letters or (
        len(paragraph) < 120 and sum(map(str.isupper, letters)) > 0.8 * len(letters) and len(letters) > 3
    )


def _blocked_pattern(prefixes: list[str]) -> re.Pattern[str] | None:
    return re.compile(r"\b(?:" + "|".join(map(re.escape, prefixes)) + ")", re.IGNORECASE) if prefixes else None


def _without_duplicates(documents: Iterable[Document]) -> list[Document]:
    """Drop documents that open with the same hundred letters: the same tale in two books."""
    unique: dict[str, Document] = {}
    for document in documents:
        unique.setdefault("".join(filter(str.isalpha, document.text.lower()))[:100], document)
    return list(unique.values())


def _common_words(documents: list[Document], num_words: int = 4000) -> set[str]:
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(re.findall(r"[a-z]+", document.text.lower()))
    return {word for word, _ in counts.most_common(num_words)}


def _difficulty(text: str, easy_words: set[str]) -> float:
    """After Dale and Chall (1948): share of unfamiliar words and length of sentences."""
    words = re.findall(r"[a-z]+", text.lower())
    num_sentences = len(re.findall(r"[.!?]+", text)) + 1
    unfamiliar = sum(word not in easy_words for word in words) / max(1, len(words))
    return 15.79 * unfamiliar + 0.0496 * min(60.0, len(words) / num_sentences) + math.exp(-len(words) / 100)
