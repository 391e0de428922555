"""Embeddings: texts that belong together come close, others in the batch move apart.

The loss is InfoNCE (van den Oord et al. 2018).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastserve.train.finetune.examples import Example, value_of
from fastserve.train.finetune.settings import FinetuneSettings
from fastserve.train.finetune.task import Encoded, batches_of, on_device, padded
from fastserve.train.objectives import Batch, label_loss

if TYPE_CHECKING:
    import torch

_SCORE_BATCH = 32


class Embedding:
    """Rows have an anchor, a positive and perhaps a negative text. A vector is the mean over a text's tokens."""

    network_class = "AutoModel"

    def __init__(self, tokenizer: Any, settings: FinetuneSettings) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self._keys = [
            "anchor" if settings.source_key == "source" else settings.source_key,
            "positive" if settings.target_key == "target" else settings.target_key,
        ]

    def configure(self, config: Any, rows: list[Example]) -> None:
        pass

    def use_labels(self, config: Any) -> None:
        pass

    def encode(self, rows: list[Example]) -> list[Encoded]:
        keys = [*self._keys, *(["negative"] if "negative" in rows[0] else [])]
        return [{key: self._text(str(value_of(row, key))) for key in keys} for row in rows]

    def batch(self, items: list[Encoded]) -> Batch:
        """All anchors, then all positives, then all negatives; `labels [B]` are the numbers of the positives."""
        texts = [item[key] for key in items[0] for item in items]
        batch = padded(texts, {"input_ids": self._tokenizer.pad_token_id or 0})
        return {**batch, "labels": np.arange(len(items), dtype=np.int64)}

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = batch.pop("labels")
        vectors = self._vectors(model, batch)
        anchors, others = vectors[: len(labels)], vectors[len(labels) :]
        return label_loss(anchors @ others.T / self._settings.temperature, labels)

    def score(self, network: Any, rows: list[Example]) -> dict[str, float]:
        """Share of anchors whose nearest text among all positives is their own."""
        import torch

        sides = []
        for key in self._keys:
            parts = [
                self._vectors(
                    network, on_device(padded(items, {"input_ids": self._tokenizer.pad_token_id or 0}), network)
                )
                for items in batches_of([self._text(str(value_of(row, key))) for row in rows], _SCORE_BATCH)
            ]
            sides.append(torch.cat(parts))
        nearest = (sides[0] @ sides[1].T).argmax(-1).tolist()
        texts = [str(row[self._keys[1]]) for row in rows]
        right = sum(texts[found] == text for found, text in zip(nearest, texts, strict=True))
        return {"recall_at_1": round(100 * right / len(rows), 3)}

    def _vectors(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """[B, H] of unit length."""
        import torch

        hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def _text(self, text: str) -> Encoded:
        encoded = self._tokenizer(text, truncation=True, max_length=self._settings.max_length)
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}
