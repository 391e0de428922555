"""The text side of an encoder's folder: tokens, labels, limits; and `Job`, what every task makes of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tokenizers

from fastserve.checkpoint.folder import ModelFolder, read_json
from fastserve.checkpoint.sentence import SentenceModules
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.core.errors import RequestError

Floats = np.ndarray[Any, np.dtype[np.float32]]

_NO_LIMIT = 1_000_000  # tokenizers without a longest text say a huge number


@dataclass(frozen=True, slots=True)
class Piece:
    """One sequence for the network; see `PoolingRequest`."""

    input_ids: list[int]
    type_ids: list[int]
    head: str = "scores"
    rows: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Job:
    """Pieces for the network, and what their arrays, in this order, become."""

    pieces: list[Piece]
    finish: Callable[[list[Floats]], Any]

    @property
    def num_tokens(self) -> int:
        """Tokens of all pieces."""
        return sum(len(piece.input_ids) for piece in self.pieces)


class EncoderText:
    """Everything about an encoder's folder that has to do with text.

    Args:
        folder: the model folder.
        max_length: longest sequence that the network takes; the folder's own files may say less.

    Attributes:
        tokenizer, sentence: see `Tokenizer` and `SentenceModules` (the defaults for a folder that has none).
        task: what the model is for, as `ModelFolder.task` says.
        labels: of a classifier, by index.
        config: config.json.

    Raises:
        CheckpointError: no tokenizer, or damaged files.
    """

    def __init__(self, folder: ModelFolder, max_length: int) -> None:
        self.tokenizer = Tokenizer.load(folder)
        sentence = SentenceModules.read(folder)
        self.sentence = sentence or SentenceModules()
        self.config: Mapping[str, Any] = folder.config
        self.task = folder.task
        settings = read_json(folder.path / "tokenizer_config.json") if folder.has("tokenizer_config.json") else {}
        limits = [max_length, self.sentence.max_length, int(settings.get("model_max_length") or 0)]
        self.max_length = min(limit for limit in limits if 0 < limit < _NO_LIMIT)
        names = folder.config.get("id2label") or {}
        count = len(names) or int(folder.config.get("num_labels") or 2)
        self.labels = [str(names.get(str(index), f"LABEL_{index}")) for index in range(count)]

    def check_task(self, *tasks: str) -> None:
        """Raise RequestError unless the model is for one of these tasks."""
        if self.task not in tasks:
            raise RequestError(f"this model is for {self.task}, not for {' or '.join(tasks)}", "model")

    def encode(self, first: str, second: str | None = None, truncate: bool = False) -> tokenizers.Encoding:
        """Tokens of a text or a pair, cut at the end where that is asked for.

        Raises:
            RequestError: too long.
        """
        if truncate:
            [encoding] = self.tokenizer.encode_parts(first, second, self.max_length, is_cut=True)
            return encoding
        [encoding] = self.tokenizer.encode_parts(first, second)
        if len(encoding) > self.max_length:
            raise RequestError(
                f"the text has {len(encoding)} tokens, but this model takes at most {self.max_length}; shorten it, or "
                "ask for truncation",
                "input",
            )
        return encoding


def piece(encoding: tokenizers.Encoding, head: str = "scores", rows: list[int] | None = None) -> Piece:
    """An encoding as a piece; types are left out where all are 0."""
    types = list(encoding.type_ids)
    return Piece(list(encoding.ids), types if any(types) else [], head, rows or [])


def softmax(scores: Floats) -> Floats:
    """Along the last axis."""
    exponents = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares: Floats = exponents / exponents.sum(axis=-1, keepdims=True)
    return shares


def sigmoid(scores: Floats) -> Floats:
    """1 / (1 + e^-x), without overflow."""
    small = np.exp(-np.abs(scores))
    result: Floats = np.where(scores >= 0, 1 / (1 + small), small / (1 + small)).astype(np.float32)
    return result
