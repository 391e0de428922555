"""Inputs of every kind as a stream of raw documents: text, JSON lines, Parquet, HTML, Markdown, hub datasets.

An input is cut into parts that separate processes can read; a part holds a byte range of a large plain file, or a whole
file. No part is ever in memory as a whole: documents are yielded one by one, and long ones are cut
(MAX_DOCUMENT_CHARACTERS).
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fastserve.core.errors import ConfigError
from fastserve.train.data.settings import PrepareSettings

SEPARATOR = "<|endoftext|>"
PART_BYTES = 32 << 20
MAX_DOCUMENT_CHARACTERS = 1_000_000
_LOOK_AHEAD_BYTES = 4 << 20  # where a text file must show its separator
HUB = "hub:"
_KINDS = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".html": "html",
    ".htm": "html",
    ".md": "markdown",
    ".markdown": "markdown",
}


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of the input: bytes [start, end) of a plain file, or all of it where `end` is 0."""

    path: str
    kind: str
    start: int = 0
    end: int = 0


def find_parts(inputs: list[str], text_documents: str, out: Path | None = None) -> list[Part]:
    """The parts of files, of all known files in folders, and of `hub:NAME[:SPLIT]`, in a fixed order.

    What lies in the folder `out` is left out of folders: an earlier run wrote it.
    """
    parts: list[Part] = []
    for item in inputs:
        if item.startswith(HUB):
            parts.append(Part(item.removeprefix(HUB), "hub"))
            continue
        path = Path(item)
        if not path.exists():
            raise ConfigError(f"there is no file or folder {item}; for a dataset of the hub write {HUB}NAME")
        files = _files_in(path, out) if path.is_dir() else [path]
        if not files:
            raise ConfigError(f"the folder {item} has no file of a known kind ({', '.join(sorted(_KINDS))}, or .gz)")
        for file in files:
            parts += _parts_of_file(file, text_documents)
    return parts


def _files_in(folder: Path, out: Path | None) -> list[Path]:
    files = sorted(found for found in folder.rglob("*") if kind_of(found) and found.is_file())
    if out is None or not out.exists():
        return files
    results = out.resolve()
    return [file for file in files if results not in file.resolve().parents]


def kind_of(path: Path) -> str | None:
    """text, json, parquet, html or markdown by the file's ending; None for others."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return _KINDS.get((suffixes[-2:-1] if suffixes[-1:] == [".gz"] else suffixes[-1:] or [""])[0]) if suffixes else None


def read_documents(part: Part, settings: PrepareSettings) -> Iterator[str]:
    """The raw texts of a part; markup is already removed from HTML and Markdown. ConfigError if it cannot be read."""
    try:
        for document in _documents(part, settings):
            if not isinstance(document, str):
                found = f"{settings.text_key!r} but {type(document).__name__}"
                raise ConfigError(f"{part.path} has no text under the key {found}; choose with --text-key")
            # JSON may hold halves of surrogate pairs, which are no characters and which no file takes.
            text = document.encode(errors="ignore").decode()
            for start in range(0, max(1, len(text)), MAX_DOCUMENT_CHARACTERS):
                yield text[start : start + MAX_DOCUMENT_CHARACTERS]
    except ConfigError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ConfigError(f"{part.path} cannot be read: {error}; repair the file or leave it out") from error


def _documents(part: Part, settings: PrepareSettings) -> Iterator[Any]:
    """What stands where the texts of a part should."""
    if part.kind == "text":
        return _text_documents(part, settings.text_documents)
    if part.kind == "json":
        return _json_documents(part, settings.text_key)
    if part.kind == "parquet":
        return _parquet_documents(part, settings.text_key)
    if part.kind == "hub":
        return _hub_documents(part, settings.text_key)
    plain = plain_html if part.kind == "html" else plain_markdown
    return iter([plain(_open(part.path).read().decode("utf-8", errors="replace"))])


def plain_html(source: str) -> str:
    """The main text of a page, without navigation and other boilerplate (trafilatura); "" where there is none."""
    import trafilatura

    return trafilatura.extract(source, include_comments=False, include_tables=True) or ""


_MARKDOWN_RULES = (
    (re.compile(r"\A---\n.*?\n---\n", re.DOTALL), ""),
    (re.compile(r"<!--.*?-->", re.DOTALL), ""),
    (re.compile(r"!\[([^\]]*)\]\([^)]*\)"), r"\1"),
    (re.compile(r"\[([^\]]*)\]\([^)]*\)"), r"\1"),
    (re.compile(r"^\s{0,3}(?:[-*_]\s*){3,}$", re.MULTILINE), ""),
    (re.compile(r"^\s{0,3}#{1,6}\s+|^\s{0,3}>\s?", re.MULTILINE), ""),
    (re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1"), r"\2"),
)


def plain_markdown(source: str) -> str:
    """Markdown without front matter, links, headings' marks and emphasis; code stays as it is."""
    pieces = re.split(r"(^```.*?^```[^\n]*$)", source, flags=re.DOTALL | re.MULTILINE)
    for index in range(0, len(pieces), 2):
        for pattern, replacement in _MARKDOWN_RULES:
            pieces[index] = pattern.sub(replacement, pieces[index])
    return "".join(pieces)


def _parts_of_file(path: Path, text_documents: str) -> list[Part]:
    kind = kind_of(path)
    if kind is None:
        raise ConfigError(f"{path} is of no known kind ({', '.join(sorted(_KINDS))}, each also as .gz)")
    size = path.stat().st_size
    is_whole = kind not in ("text", "json") or path.suffix == ".gz" or size <= PART_BYTES
    if is_whole or (kind == "text" and _document_form(str(path), text_documents) == "file"):
        return [Part(str(path), kind)]
    return [Part(str(path), kind, start, min(start + PART_BYTES, size)) for start in range(0, size, PART_BYTES)]


def _open(path: str) -> IO[bytes]:
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def _lines(part: Part, mark: bytes | None = None) -> Iterator[str]:
    """The lines that a part owns.

    Without a mark: those that begin in [start, end). With one: those behind the first line `mark` that begins at or
    after `start` (at the beginning of the file: all), up to and with the first that begins at or after `end`.
    """
    with _open(part.path) as file:
        position = part.start
        if part.start:
            # One byte earlier: a line that begins at `start` is then not taken for the rest of one.
            file.seek(part.start - 1)
            position += len(file.readline()) - 1
            is_owner = mark is None
            while not is_owner and position < part.end:
                line = file.readline()
                is_owner = line.strip() == mark and bool(line)
                position += max(1, len(line))
            if not is_owner:
                return
        for line in file:
            is_behind_end = part.end > 0 and position >= part.end
            if is_behind_end and mark is None:
                return
            position += len(line)
            yield line.decode("utf-8", errors="replace")
            if is_behind_end and line.strip() == mark:
                return


def _document_form(path: str, text_documents: str) -> str:
    if text_documents != "auto":
        return text_documents
    with _open(path) as file:
        return "separator" if SEPARATOR.encode() in file.read(_LOOK_AHEAD_BYTES) else "file"


def _text_documents(part: Part, text_documents: str) -> Iterator[str]:
    text_documents = _document_form(part.path, text_documents)
    if text_documents == "line":
        yield from _lines(part)
        return
    mark = {"separator": SEPARATOR.encode(), "blank-line": b"", "file": None}[text_documents]
    document = io.StringIO()
    for line in _lines(part, mark):
        is_end = mark is not None and line.strip().encode() == mark
        if not is_end:
            document.write(line)
        if (is_end or document.tell() >= MAX_DOCUMENT_CHARACTERS) and document.tell():
            yield document.getvalue()
            document = io.StringIO()
    if document.tell():
        yield document.getvalue()


def _json_documents(part: Part, key: str) -> Iterator[str]:
    for number, line in enumerate(_lines(part)):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            raise ConfigError(f"{part.path}: line {number + 1} after byte {part.start} is not JSON") from None
        if not isinstance(row, dict) or not isinstance(row.get(key), str):
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ConfigError(f"{part.path} has no text under the key {key!r} (it has {found}); choose with --text-key")
        yield row[key]


def _parquet_documents(part: Part, key: str) -> Iterator[str]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(part.path) as file:
        if key not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise ConfigError(f"{part.path} has no column {key!r} (it has {names}); choose with --text-key")
        for batch in file.iter_batches(batch_size=256, columns=[key]):
            yield from (text for text in batch.column(0).to_pylist() if text)


def _hub_documents(part: Part, key: str) -> Iterator[str]:
    import datasets

    name, _, split = part.path.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train", streaming=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the dataset {name!r} cannot be opened: {error}") from error
    for row in rows:
        if key not in row:
            raise ConfigError(f"{name} has no column {key!r} (it has {', '.join(row)}); choose with --text-key")
        if row[key] is not None:
            yield row[key]
