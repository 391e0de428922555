"""Token shards: the ids of a corpus in flat files that are mapped, never read whole.

    FOLDER/tokens.json            tokenizer's hash, vocabulary size, and the files of each split with their sizes
    FOLDER/tokenizer/             the tokenizer they were made with
    FOLDER/train-00000.tokens     ids of all documents end to end (uint16, or uint32 for a large vocabulary)
    FOLDER/train-00000.ends       where each document ends (uint64)
Documents hold text tokens alone: what opens and closes one is the objective's choice.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastserve.core.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

INDEX = "tokens.json"
_BATCH = 256  # documents encoded at a time


@dataclass(frozen=True, slots=True)
class ShardSize:
    """One shard as the index lists it; `num_bytes` is the size of its text in UTF-8."""

    name: str
    documents: int
    tokens: int
    num_bytes: int


def tokenizer_hash(folder: Path) -> str:
    """sha256 of tokenizer.json; ConfigError if there is none."""
    return hashlib.sha256(_tokenizer_file(folder).read_bytes()).hexdigest()


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that packs; ConfigError if there is none or it is damaged."""
    from tokenizers import Tokenizer

    file = _tokenizer_file(folder)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises no kind of its own
        raise ConfigError(f"{file} cannot be read: {error}; make it anew with `fastserve tokenizer train`") from error


def _tokenizer_file(folder: Path) -> Path:
    if not (file := folder / "tokenizer.json").exists():
        raise ConfigError(f"{folder} has no tokenizer.json; make a tokenizer with `fastserve tokenizer train`")
    return file


def write_shard(folder: Path, name: str, texts: Iterator[str], tokenizer: Tokenizer) -> ShardSize:
    """Encode `texts` into one shard. A kill leaves only `.partial` files, which the next run writes again."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32
    ends, num_bytes = [0], 0
    tokens_path, ends_path = folder / f"{name}.tokens", folder / f"{name}.ends"
    with open(f"{tokens_path}.partial", "wb") as file:
        while batch := list(itertools.islice(texts, _BATCH)):
            num_bytes += sum(len(text.encode()) for text in batch)
            for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                file.write(np.array(encoding.ids, dtype=dtype).tobytes())
                ends.append(ends[-1] + len(encoding.ids))
    np.array(ends[1:], dtype=np.uint64).tofile(f"{ends_path}.partial")
    os.replace(f"{ends_path}.partial", ends_path)
    os.replace(f"{tokens_path}.partial", tokens_path)
    return ShardSize(name, len(ends) - 1, ends[-1], num_bytes)


def write_index(folder: Path, tokenizer_sha256: str, vocab_size: int, splits: dict[str, list[ShardSize]]) -> None:
    """Write tokens.json, last of all files: a folder without it is unfinished."""
    import dataclasses

    values = {
        "tokenizer_sha256": tokenizer_sha256,
        "vocab_size": vocab_size,
        "dtype": "uint16" if vocab_size <= 1 << 16 else "uint32",
        "splits": {split: [dataclasses.asdict(shard) for shard in shards] for split, shards in splits.items()},
    }
    partial = folder / f"{INDEX}.partial"
    partial.write_text(json.dumps(values, indent=1), encoding="utf-8")
    os.replace(partial, folder / INDEX)


class TokenDataset:
    """The documents of one split, by number.

    Attributes:
        lengths: [N] tokens of each document.
    """

    def __init__(self, folder: Path, split: str) -> None:
        """Map the shards of a split. ConfigError if the folder is no shard folder, damaged, or the split is empty."""
        index = read_index(folder)
        if split not in index["splits"]:
            raise ConfigError(f"{folder} has no split {split!r}; it has {', '.join(index['splits'])}")
        self.folder, self.vocab_size = folder, int(index["vocab_size"])
        self.tokenizer_sha256 = str(index["tokenizer_sha256"])
        self.num_bytes = sum(shard["num_bytes"] for shard in index["splits"][split])
        shards = [shard for shard in index["splits"][split] if shard["tokens"]]
        self._files = [_mapped(folder / f"{shard['name']}.tokens", index["dtype"], shard["tokens"]) for shard in shards]
        ends = [_mapped(folder / f"{shard['name']}.ends", "uint64", shard["documents"]) for shard in shards]
        self._starts = [np.concatenate([[0], shard_ends[:-1]]).astype(np.int64) for shard_ends in ends]
        self.lengths = np.concatenate(
            [np.zeros(0, np.int64), *(np.diff(end, prepend=0).astype(np.int64) for end in ends)]
        )
        self._first_document = np.cumsum([0, *(len(end) for end in ends)])
        if not self.num_tokens:
            raise ConfigError(f"the split {split!r} of {folder} has no tokens; give `data prepare` more text")

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, number: int, start: int = 0, length: int | None = None) -> NDArray[np.int64]:
        """Tokens [start, start + length) of a document, to its end without a length."""
        shard = int(np.searchsorted(self._first_document, number, side="right")) - 1
        first = int(self._starts[shard][number - self._first_document[shard]]) + start
        room = int(self.lengths[number]) - start
        return self._files[shard][first : first + (room if length is None else min(length, room))].astype(np.int64)


def read_index(folder: Path) -> dict[str, Any]:
    """tokens.json of a shard folder, or of the folder `tokens` in it."""
    if not (folder / INDEX).exists():
        raise ConfigError(
            f"{folder} holds no token shards; make them with `fastserve data prepare INPUT --out OUT "
            "--tokenizer FOLDER` and name OUT/tokens"
        )
    index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return index


def split_texts(folder: Path, split: str) -> Iterable[str]:
    """The clean texts of a prepared folder, from its JSON lines."""
    files = sorted((folder / "text").glob(f"{split}-*.jsonl"))
    if not files:
        raise ConfigError(f"{folder} holds no prepared text; run `fastserve data prepare INPUT --out {folder}` first")
    for path in files:
        with open(path, encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)["text"]


def _mapped(path: Path, dtype: str, size: int) -> Any:
    if not path.exists() or path.stat().st_size != size * np.dtype(dtype).itemsize:
        raise ConfigError(f"{path} is missing or has the wrong size; run `fastserve data prepare` again")
    return np.memmap(path, dtype=dtype, mode="r")
