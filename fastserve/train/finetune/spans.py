"""Extractive question answering: where in a text the answer stands. Long texts are read in overlapping windows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastserve.core.errors import ConfigError
from fastserve.train.finetune.examples import Example, value_of
from fastserve.train.finetune.settings import FinetuneSettings
from fastserve.train.finetune.task import Encoded, batches_of, on_device, padded
from fastserve.train.metrics import answer_scores
from fastserve.train.objectives import Batch, label_loss

if TYPE_CHECKING:
    import torch

_SCORE_BATCH = 16
_CANDIDATES = 20  # starts and ends considered per window


class QuestionAnswering:
    """Rows have question, context and answers as SQuAD's, or answers as plain texts, which are looked for."""

    network_class = "AutoModelForQuestionAnswering"

    def __init__(self, tokenizer: Any, settings: FinetuneSettings) -> None:
        self._tokenizer, self._settings = tokenizer, settings

    def configure(self, config: Any, rows: list[Example]) -> None:
        config.num_labels = 2

    def use_labels(self, config: Any) -> None:
        pass

    def encode(self, rows: list[Example]) -> list[Encoded]:
        """A window per item; in windows without the answer, both ends are the first token."""
        items: list[Encoded] = []
        for row in rows:
            if (span := answer_span(row)) is None:
                continue
            for window, offsets in self._windows(row):
                items.append({**window, "labels": _token_span(offsets, *span)})
        if not items:
            raise ConfigError("no answer stands in its context as it is written; give answers with `answer_start`")
        return items

    def batch(self, items: list[Encoded]) -> Batch:
        spans = np.array([item["labels"] for item in items], dtype=np.int64)  # [B, 2]
        keys = tuple(name for name in items[0] if name != "labels")
        return {**padded(items, {"input_ids": self._tokenizer.pad_token_id or 0}, keys), "labels": spans}

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = batch.pop("labels")
        outputs = model(**batch)
        return label_loss(outputs.start_logits, labels[:, 0]) + label_loss(outputs.end_logits, labels[:, 1])

    def score(self, network: Any, rows: list[Example]) -> dict[str, float]:
        return answer_scores(self.predict(network, rows), [answers_of(row) for row in rows])

    def predict(self, network: Any, rows: list[Example]) -> list[str]:
        """The likeliest span of each context, over all its windows."""
        owners, windows, all_offsets = [], [], []
        for index, row in enumerate(rows):
            for window, offsets in self._windows(row):
                owners.append(index)
                windows.append({**window, "labels": [0, 0]})
                all_offsets.append(offsets)
        best = [(-np.inf, 0, 0)] * len(rows)
        for numbers in batches_of(list(range(len(windows))), _SCORE_BATCH):
            batch = on_device(self.batch([windows[number] for number in numbers]), network)
            batch.pop("labels")
            outputs = network(**batch)
            starts, ends = outputs.start_logits.float().cpu().numpy(), outputs.end_logits.float().cpu().numpy()
            for row_in_batch, number in enumerate(numbers):
                offsets = all_offsets[number]
                found = self._best_span(starts[row_in_batch], ends[row_in_batch], offsets)
                if found[0] > best[owners[number]][0]:
                    first, last = offsets[found[1]], offsets[found[2]]
                    assert first is not None and last is not None  # outside the context scores are minus infinity
                    best[owners[number]] = (found[0], first[0], last[1])
        return [row["context"][start:end] for row, (_, start, end) in zip(rows, best, strict=True)]

    def _best_span(self, starts: Any, ends: Any, offsets: list[tuple[int, int] | None]) -> tuple[float, int, int]:
        """(score, first token, last token) of the best span inside the context."""
        outside = np.array([offset is None for offset in offsets])
        starts = np.where(outside, -np.inf, starts[: len(offsets)])
        ends = np.where(outside, -np.inf, ends[: len(offsets)])
        best = (-np.inf, 0, 0)
        for start in np.argsort(-starts)[:_CANDIDATES].tolist():
            last = min(len(offsets), start + self._settings.max_answer_tokens)
            end = start + int(np.argmax(ends[start:last]))
            score = float(starts[start] + ends[end])
            if score > best[0]:
                best = (score, start, end)
        return best

    def _windows(self, row: Example) -> list[tuple[Encoded, list[tuple[int, int] | None]]]:
        """The inputs of each window, and each token's characters in the context (None: not of the context)."""
        room = self._settings.max_length
        question = self._tokenizer(str(value_of(row, "question")), add_special_tokens=False)["input_ids"]
        if len(question) > room // 2:
            raise ConfigError(f"a question has {len(question)} tokens, more than half of max_length ({room})")
        encoded = self._tokenizer(
            str(row["question"]),
            str(value_of(row, "context")),
            truncation="only_second",
            max_length=room,
            stride=min(self._settings.stride, (room - len(question)) // 2),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        names = [name for name in encoded if name not in ("offset_mapping", "overflow_to_sample_mapping")]
        found = []
        for window, offsets in enumerate(encoded["offset_mapping"]):
            kinds = encoded.sequence_ids(window)
            places = [tuple(offset) if kind == 1 else None for offset, kind in zip(offsets, kinds, strict=True)]
            found.append(({name: encoded[name][window] for name in names}, places))
        return found


def answers_of(row: Example) -> list[str]:
    """All right answers of a row, in any of the forms."""
    answers = value_of(row, "answers")
    return list(answers["text"]) if isinstance(answers, dict) else list(answers)


def answer_span(row: Example) -> tuple[int, int] | None:
    """Characters [start, end) of the first answer in the context; None where it does not stand there."""
    answers, context = value_of(row, "answers"), str(value_of(row, "context"))
    if isinstance(answers, dict) and answers.get("answer_start"):
        start, text = answers["answer_start"][0], answers["text"][0]
        if context[start : start + len(text)] == text:
            return start, start + len(text)
    for text in answers_of(row):
        if (start := context.lower().find(text.lower())) >= 0 and text:
            return start, start + len(text)
    return None


def _token_span(offsets: list[tuple[int, int] | None], start: int, end: int) -> list[int]:
    inside = [
        index for index, offset in enumerate(offsets) if offset is not None and offset[0] < end and offset[1] > start
    ]
    covered = [offset for offset in offsets if offset is not None]
    # An answer that the window cuts is none: the other window has it whole.
    if not inside or covered[0][0] > start or covered[-1][1] < end:
        return [0, 0]
    return [inside[0], inside[-1]]
