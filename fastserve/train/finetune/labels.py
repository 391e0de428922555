"""Labels of texts (classification) and of words (token classification)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastserve.core.errors import ConfigError
from fastserve.train.finetune.examples import Example, value_of
from fastserve.train.finetune.settings import FinetuneSettings
from fastserve.train.finetune.task import Encoded, batches_of, give_types, on_device, padded
from fastserve.train.metrics import entity_scores, label_scores
from fastserve.train.objectives import IGNORED, Batch, label_loss

if TYPE_CHECKING:
    import torch

_SCORE_BATCH = 32
_PAIR_KEY = "text_pair"


class _Labelling:
    """Labels by name and number, of texts or of words."""

    def __init__(self, tokenizer: Any, settings: FinetuneSettings) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self._ids: dict[str, int] = {}
        self._names: list[str] = []

    def use_labels(self, config: Any) -> None:
        """Take the labels that a configuration names."""
        give_types(self._tokenizer, config)
        self._names = [config.id2label[index] for index in range(config.num_labels)]
        self._ids = {name: index for index, name in enumerate(self._names)}

    def batch(self, items: list[Encoded]) -> Batch:
        return padded(items, {"input_ids": self._tokenizer.pad_token_id or 0})

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = batch.pop("labels")
        return label_loss(model(**batch).logits, labels)

    def _id_of(self, name: str) -> int:
        if name not in self._ids:
            raise ConfigError(f"the label {name!r} is not one of those trained on ({', '.join(self._names[:10])}...)")
        return self._ids[name]


class Classification(_Labelling):
    """One label per text, or per pair of texts where rows have `text_pair`."""

    network_class = "AutoModelForSequenceClassification"

    def configure(self, config: Any, rows: list[Example]) -> None:
        names = sorted({str(value_of(row, self._settings.label_key)) for row in rows})
        _set_labels(config, names)
        self.use_labels(config)

    def encode(self, rows: list[Example]) -> list[Encoded]:
        texts = [str(value_of(row, self._settings.text_key)) for row in rows]
        pairs = [str(value_of(row, _PAIR_KEY)) for row in rows] if _PAIR_KEY in rows[0] else None
        encoded = self._tokenizer(texts, pairs, truncation=True, max_length=self._settings.max_length)
        labels = [self._id_of(str(value_of(row, self._settings.label_key))) for row in rows]
        return [
            {**{name: values[index] for name, values in encoded.items()}, "labels": labels[index]}
            for index in range(len(rows))
        ]

    def score(self, network: Any, rows: list[Example]) -> dict[str, float]:
        found = self.predict(network, rows)
        return label_scores(found, [str(value_of(row, self._settings.label_key)) for row in rows])

    def predict(self, network: Any, rows: list[Example]) -> list[str]:
        """The name of the likeliest label of each row."""
        found: list[str] = []
        for items in batches_of(self.encode(rows), _SCORE_BATCH):
            batch = on_device(self.batch(items), network)
            batch.pop("labels")
            found += [self._names[index] for index in network(**batch).logits.argmax(-1).tolist()]
        return found


class TokenClassification(_Labelling):
    """One label per word; rows have lists of words and of labels. A word's first token carries its label."""

    network_class = "AutoModelForTokenClassification"

    def __init__(self, tokenizer: Any, settings: FinetuneSettings) -> None:
        super().__init__(tokenizer, settings)
        self._key = "tokens" if settings.text_key == "text" else settings.text_key
        self._label_key = "labels" if settings.label_key == "label" else settings.label_key

    def configure(self, config: Any, rows: list[Example]) -> None:
        _set_labels(config, sorted({str(label) for row in rows for label in _listed(row, self._label_key)}))
        self.use_labels(config)

    def encode(self, rows: list[Example]) -> list[Encoded]:
        return [item for item, _ in self._encoded(rows)]

    def score(self, network: Any, rows: list[Example]) -> dict[str, float]:
        return entity_scores(
            self.predict(network, rows), [[str(name) for name in row[self._label_key]] for row in rows]
        )

    def predict(self, network: Any, rows: list[Example]) -> list[list[str]]:
        """A label per word; words that truncation took away have the first label, O where there is one."""
        outside = "O" if "O" in self._ids else self._names[0]
        found: list[list[str]] = []
        encoded = self._encoded(rows)
        for start in range(0, len(rows), _SCORE_BATCH):
            part = encoded[start : start + _SCORE_BATCH]
            batch = on_device(self.batch([item for item, _ in part]), network)
            batch.pop("labels")
            best = network(**batch).logits.argmax(-1).tolist()
            for row, (_, places), labels in zip(rows[start:], part, best, strict=False):
                names = [outside] * len(row[self._key])
                for word, place in places.items():
                    names[word] = self._names[labels[place]]
                found.append(names)
        return found

    def _encoded(self, rows: list[Example]) -> list[tuple[Encoded, dict[int, int]]]:
        """Each row's inputs, and word -> its first token."""
        found = []
        for row in rows:
            words, labels = _listed(row, self._key), _listed(row, self._label_key)
            if len(words) != len(labels):
                raise ConfigError(f"an example has {len(words)} words and {len(labels)} labels")
            encoded = self._tokenizer(
                words, is_split_into_words=True, truncation=True, max_length=self._settings.max_length
            )
            places: dict[int, int] = {}
            for place, word in enumerate(encoded.word_ids()):
                if word is not None:
                    places.setdefault(word, place)
            targets = [IGNORED] * len(encoded["input_ids"])
            for word, place in places.items():
                targets[place] = self._id_of(str(labels[word]))
            found.append(({**encoded, "labels": targets}, places))
        return found


def _listed(row: Example, key: str) -> list[Any]:
    """The words or labels of an example."""
    if not isinstance(values := value_of(row, key), list) or None in values:
        raise ConfigError(f"an example must have a list without nulls under {key!r}, not {values!r:.40}")
    return values


def _set_labels(config: Any, names: list[str]) -> None:
    if len(names) < 2:
        raise ConfigError(f"the examples have only the label {names[0]!r}; there must be two or more")
    config.num_labels = len(names)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = "single_label_classification"
