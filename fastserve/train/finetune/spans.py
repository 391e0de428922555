"""Extractive question answering: where in a text the answer stands. Long texts are read in overlapping windows."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from fastserve.core.errors import ConfigError
from fastserve.train.finetune.examples import Example, value_of
from fastserve.train.finetune.settings import FinetuneSettings
from fastserve.train.finetune.task import Encoded, batches_of, give_types, on_device, padded
from fastserve.train.metrics import answer_scores
from fastserve.train.objectives import Batch, label_loss

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)
_SCORE_BATCH = 16


class QuestionAnswering:
    """Rows have question, context and answers as SQuAD's, or answers as plain texts, which are looked for."""

    network_class = "AutoModelForQuestionAnswering"

    def __init__(self, tokenizer: Any, settings: FinetuneSettings) -> None:
        self._tokenizer, self._settings = tokenizer, settings

    def configure(self, config: Any, rows: list[Example]) -> None:
        config.num_labels = 2
        self.use_labels(config)

    def use_labels(self, config: Any) -> None:
        give_types(self._tokenizer, config)

    def encode(self, rows: list[Example]) -> list[Encoded]:
        """A window per item; in windows without the answer, both ends are the first token."""
        items: list[Encoded] = []
        lost = 0
        for row in rows:
            if (span := answer_span(row)) is None:
                lost += 1
                continue
            encoded = self._encoded(row)
            for window, encoding in zip(_inputs(encoded), encoded.encodings, strict=True):
                items.append({**window, "labels": _token_span(encoding, *span)})
        if not items:
            raise ConfigError("no answer stands in its context as it is written; give answers with `answer_start`")
        if lost:
            _log.warning("left out: %d of %d questions, whose answer does not stand in the context", lost, len(rows))
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
        """The likeliest span of each context, over all its windows, by the rules that serving has."""
        from fastserve.offline.tasks.question_answering import AnswerRules, choose_answers

        cut = [self._encoded(row) for row in rows]
        windows = [{**window, "labels": [0, 0]} for encoded in cut for window in _inputs(encoded)]
        scores: list[Any] = []
        for items in batches_of(windows, _SCORE_BATCH):
            batch = on_device(self.batch(items), network)
            batch.pop("labels")
            outputs = network(**batch)
            both = np.stack([outputs.start_logits.float().cpu(), outputs.end_logits.float().cpu()], axis=-1)
            scores += [logits[: len(item["input_ids"])] for logits, item in zip(both, items, strict=True)]
        rules = AnswerRules(max_answer_length=self._settings.max_answer_tokens or 30)
        found = []
        for row, encoded in zip(rows, cut, strict=True):
            own, scores = scores[: len(encoded.encodings)], scores[len(encoded.encodings) :]
            found.append(choose_answers(row["context"], encoded.encodings, own, rules)[0]["answer"])
        return found

    def _encoded(self, row: Example) -> Any:
        """transformers' encoding of question and context, an entry for each window."""
        from fastserve.offline.tasks.question_answering import window_stride

        room = self._settings.max_length
        question = self._tokenizer(str(value_of(row, "question")), add_special_tokens=False)["input_ids"]
        if len(question) > room // 2:
            raise ConfigError(f"a question has {len(question)} tokens, more than half of max_length ({room})")
        return self._tokenizer(
            str(row["question"]),
            str(value_of(row, "context")),
            truncation="only_second",
            max_length=room,
            stride=window_stride(self._settings.stride, room, len(question)),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )


def _inputs(encoded: Any) -> list[Encoded]:
    """What the network reads of each window."""
    names = [name for name in encoded if name not in ("offset_mapping", "overflow_to_sample_mapping")]
    return [{name: encoded[name][window] for name in names} for window in range(len(encoded.encodings))]


def answers_of(row: Example) -> list[str]:
    """All right answers of a row, in any of the forms."""
    answers = value_of(row, "answers")
    texts = answers.get("text") if isinstance(answers, dict) else answers
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(
            f"answers must be a text, a list of texts, or SQuAD's text and answer_start, not {answers!r:.60}"
        )
    return texts


def answer_span(row: Example) -> tuple[int, int] | None:
    """Characters [start, end) of the first answer in the context; None where it does not stand there."""
    answers, context = value_of(row, "answers"), str(value_of(row, "context"))
    texts = answers_of(row)
    starts = answers.get("answer_start") if isinstance(answers, dict) else None
    starts = [starts] if isinstance(starts, int) else starts
    if starts and texts:
        start, text = starts[0], texts[0]
        if context[start : start + len(text)] == text:
            return start, start + len(text)
    for text in texts:
        if (start := context.lower().find(text.lower())) >= 0 and text:
            return start, start + len(text)
    return None


def _token_span(window: Any, start: int, end: int) -> list[int]:
    """First and last token of the characters [start, end) of the context; [0, 0] where a window has not all of them."""
    places = [index for index, sequence in enumerate(window.sequence_ids) if sequence == 1]
    inside = [index for index in places if window.offsets[index][0] < end and window.offsets[index][1] > start]
    # An answer that the window cuts is none: the other window has it whole.
    if not inside or window.offsets[places[0]][0] > start or window.offsets[places[-1]][1] < end:
        return [0, 0]
    return [inside[0], inside[-1]]
