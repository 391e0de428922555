"""Text to text: translation and summarisation with encoder-decoder networks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastserve.core.errors import ConfigError
from fastserve.train.finetune.examples import Example, value_of
from fastserve.train.finetune.settings import FinetuneSettings
from fastserve.train.finetune.task import Encoded, batches_of, on_device, padded
from fastserve.train.metrics import text_scores
from fastserve.train.objectives import IGNORED, Batch, label_loss

if TYPE_CHECKING:
    import torch

_SCORE_BATCH = 16


class Sequences:
    """Rows have a source and a target (text, or a list of references of which the first is learnt)."""

    network_class = "AutoModelForSeq2SeqLM"

    def __init__(self, tokenizer: Any, settings: FinetuneSettings) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self._start = 0

    def configure(self, config: Any, rows: list[Example]) -> None:
        self.use_labels(config)

    def use_labels(self, config: Any) -> None:
        start = getattr(config, "decoder_start_token_id", None)
        if start is None:
            raise ConfigError("the network's config.json has no decoder_start_token_id; is it an encoder-decoder?")
        self._start = int(start)

    def encode(self, rows: list[Example]) -> list[Encoded]:
        sources = self._sources(rows)
        targets = self._tokenizer(
            text_target=[references_of(row, self._settings.target_key)[0] for row in rows],
            truncation=True,
            max_length=self._settings.max_length,
        )["input_ids"]
        return [{**source, "labels": list(target)} for source, target in zip(sources, targets, strict=True)]

    def batch(self, items: list[Encoded]) -> Batch:
        padding = self._tokenizer.pad_token_id or 0
        batch = padded(items, {"input_ids": padding})
        labels = batch["labels"]
        decoder = np.concatenate([np.full((len(items), 1), self._start), labels[:, :-1]], axis=1)
        batch["decoder_input_ids"] = np.where(decoder == IGNORED, padding, decoder)
        return batch

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = batch.pop("labels")
        return label_loss(model(**batch, use_cache=False).logits, labels)

    def score(self, network: Any, rows: list[Example]) -> dict[str, float]:
        return text_scores(self.predict(network, rows), [references_of(row, self._settings.target_key) for row in rows])

    def predict(self, network: Any, rows: list[Example]) -> list[str]:
        """The greedy output for each source."""
        longest = self._settings.max_answer_tokens or self._settings.max_length
        found: list[str] = []
        for items in batches_of(self._sources(rows), _SCORE_BATCH):
            batch = on_device(padded(items, {"input_ids": self._tokenizer.pad_token_id or 0}), network)
            tokens = network.generate(**batch, do_sample=False, max_new_tokens=longest)
            found += self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return found

    def _sources(self, rows: list[Example]) -> list[Encoded]:
        texts = [self._settings.source_prefix + str(value_of(row, self._settings.source_key)) for row in rows]
        encoded = self._tokenizer(texts, truncation=True, max_length=self._settings.max_length)
        names = ("input_ids", "attention_mask")
        return [{name: encoded[name][index] for name in names} for index in range(len(rows))]


def references_of(row: Example, key: str) -> list[str]:
    value = value_of(row, key)
    return [value] if isinstance(value, str) else list(value)
