"""What a network learns from rows of tokens: batches of arrays, and the loss of one.

A batch holds the network's inputs by their names and `labels` (IGNORED where nothing is to be learnt); losses are sums
over labels, so that they add up over micro-batches and processes. Random choices follow from (seed, row) alone.

Sources: BERT (Devlin et al. 2019, section 3.1), ALBERT (Lan et al. 2020, section 3.1), T5 (Raffel et al. 2020, 3.1.4).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastserve.core.errors import ConfigError
from fastserve.train.rows import Row, Tokens
from fastserve.train.settings import ObjectiveSection

if TYPE_CHECKING:
    import torch

IGNORED = -100
Batch = dict[str, NDArray[Any]]
_ORDER = "order_labels"


class Objective(Protocol):
    """Turns rows into batches and batches into losses."""

    row_length: int  # tokens of text to ask of a row source

    def batch(self, rows: list[Row], seed: int) -> Batch: ...

    def inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """What the network is called with."""

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor: ...


def label_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of cross-entropies in nats over the labels that are not IGNORED, in float32."""
    import torch

    rows, labels = logits.flatten(0, -2), labels.flatten()
    if rows.device.type == "cpu" and rows.dtype is not torch.float16 and not torch.compiler.is_compiling():
        from fastserve.train.token_loss import token_loss

        return token_loss(rows, labels, IGNORED)
    return torch.nn.functional.cross_entropy(rows.float(), labels, ignore_index=IGNORED, reduction="sum")


def num_labels(batch: Batch) -> int:
    return int((batch["labels"] != IGNORED).sum())


class Causal:
    """The next token. Documents of a row do not see each other: positions begin again, which transformers reads so."""

    def __init__(self, length: int, packing: bool) -> None:
        self.row_length, self._packing = length, packing

    def batch(self, rows: list[Row], seed: int) -> Batch:
        tokens = np.stack([row.tokens for row in rows])  # [B, L + 1]
        labels = tokens[:, 1:].copy()
        batch = {"input_ids": tokens[:, :-1]}
        if self._packing:
            documents = np.stack([row.documents for row in rows])
            labels[documents[:, 1:] != documents[:, :-1]] = IGNORED
            batch["position_ids"] = np.stack([row.positions for row in rows])[:, :-1]
        return {**batch, "labels": labels}

    def inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {**_without(batch, "labels"), "use_cache": False}

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return label_loss(model(**self.inputs(batch)).logits, batch["labels"])


class Masked:
    """Tokens behind a mask: of the chosen ones 80 % become [MASK], 10 % any token, 10 % stay."""

    def __init__(self, length: int, section: ObjectiveSection, special: SpecialIds, position_offset: int) -> None:
        self.row_length, self._section, self._special, self._offset = length, section, special, position_offset
        assert special.mask >= 0  # ask now: a tokenizer without one is an error before the first step

    def batch(self, rows: list[Row], seed: int) -> Batch:
        masked = [_mask(row.tokens, self._section.masked_share, self._special, _chooser(seed, row)) for row in rows]
        batch = {"input_ids": np.stack([item[0] for item in masked]), "labels": np.stack([item[1] for item in masked])}
        if self._section.packing:
            batch["documents"] = np.stack([row.documents for row in rows])
            batch["position_ids"] = np.stack([row.positions for row in rows]) + self._offset
        return batch

    def inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        import torch

        inputs = _without(batch, "labels", "documents")
        if "documents" in batch:
            documents = batch["documents"]
            is_other = documents[:, None, :, None] != documents[:, None, None, :]  # [B, 1, L, L]
            # To be added to scores: every implementation of attention takes this form, not every one a boolean mask.
            inputs["attention_mask"] = is_other * torch.finfo(torch.bfloat16).min
        return inputs

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return label_loss(model(**self.inputs(batch)).logits, batch["labels"])


class SentenceOrder:
    """Masked tokens, and whether the two halves of a window stand in their order."""

    def __init__(self, length: int, section: ObjectiveSection, special: SpecialIds) -> None:
        self.row_length, self._length, self._section, self._special = length - 3, length, section, special
        assert special.mask >= 0

    def batch(self, rows: list[Row], seed: int) -> Batch:
        shape = (len(rows), self._length)
        input_ids = np.full(shape, self._special.padding, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        types, attention = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        order = np.zeros(len(rows), dtype=np.int64)
        for index, row in enumerate(rows):
            chooser = _chooser(seed, row)
            cut = chooser.integers(1, len(row.tokens))
            first, second = row.tokens[:cut], row.tokens[cut:]
            order[index] = chooser.integers(2)
            if order[index]:
                first, second = second, first
            opening, closing = [self._special.start], [self._special.end]
            whole = np.concatenate([opening, first, closing, second, closing])
            place = (index, slice(0, len(whole)))
            input_ids[place], labels[place] = _mask(whole, self._section.masked_share, self._special, chooser)
            attention[place] = 1
            types[index, len(first) + 2 : len(whole)] = 1
        return {
            "input_ids": input_ids,
            "attention_mask": attention,
            "token_type_ids": types,
            "labels": labels,
            _ORDER: order,
        }

    def inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        return _without(batch, "labels", _ORDER)

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels, order = batch["labels"], batch[_ORDER]
        outputs = model(**self.inputs(batch))
        # The loss is a sum over labels; the order's mean must weigh as much as theirs.
        share = (labels != IGNORED).sum() / len(order)
        return label_loss(outputs.prediction_logits, labels) + share * label_loss(outputs.sop_logits, order)


class SpanCorruption:
    """Spans replaced by sentinels in the encoder's input; the decoder writes the sentinels with their spans."""

    def __init__(self, length: int, section: ObjectiveSection, special: SpecialIds) -> None:
        self._length, self._section, self._special = length, section, special
        # The longest text whose corrupted form, with sentinels and </s>, still fits into a row.
        self.row_length = next(
            size
            for size in range(2 * length, 0, -1)
            if size - (counts := self._counts(size))[0] + counts[1] + 1 <= length
        )
        noise, spans = self._counts(self.row_length)
        self._target_length = noise + spans + 2
        if spans + 1 > len(special.sentinels):
            raise ConfigError(
                f"rows of {length} tokens need {spans + 1} sentinels; the tokenizer has {len(special.sentinels)}"
            )

    def batch(self, rows: list[Row], seed: int) -> Batch:
        input_ids = np.full((len(rows), self._length), self._special.padding, dtype=np.int64)
        labels = np.full((len(rows), self._target_length), IGNORED, dtype=np.int64)
        attention = np.zeros_like(input_ids)
        for index, row in enumerate(rows):
            source, target = self._corrupt(row.tokens, _chooser(seed, row))
            input_ids[index, : len(source)], attention[index, : len(source)] = source, 1
            labels[index, : len(target)] = target
        decoder = np.concatenate([np.full((len(rows), 1), self._special.padding), labels[:, :-1]], axis=1)
        decoder[decoder == IGNORED] = self._special.padding
        return {"input_ids": input_ids, "attention_mask": attention, "decoder_input_ids": decoder, "labels": labels}

    def inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {**_without(batch, "labels"), "use_cache": False}

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return label_loss(model(**self.inputs(batch)).logits, batch["labels"])

    def _counts(self, size: int) -> tuple[int, int]:
        """(tokens taken out, spans) of a text of `size` tokens."""
        noise = min(max(1, round(size * self._section.masked_share)), size - 1)
        return noise, max(1, min(round(noise / self._section.mean_span), noise, size - noise))

    def _corrupt(self, tokens: Tokens, chooser: np.random.Generator) -> tuple[Tokens, Tokens]:
        noise, spans = self._counts(len(tokens))
        taken, kept = _parts(noise, spans, chooser), _parts(len(tokens) - noise, spans, chooser)
        source: list[Tokens] = []
        target: list[Tokens] = []
        position = 0
        for span, sentinel in zip(range(spans), self._special.sentinels, strict=False):
            mark = np.array([sentinel])
            source += [tokens[position : position + kept[span]], mark]
            position += kept[span]
            target += [mark, tokens[position : position + taken[span]]]
            position += taken[span]
        end = np.array([self._special.end])
        return np.concatenate([*source, end]), np.concatenate(
            [*target, np.array([self._special.sentinels[spans]]), end]
        )


class SpecialIds:
    """The ids of a tokenizer's special tokens; an objective asks only for those it needs."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def start(self) -> int:
        return self._id("cls_token")

    @property
    def end(self) -> int:
        return self._id("sep_token" if self._tokenizer.eos_token_id is None else "eos_token")

    @property
    def padding(self) -> int:
        return self._id("pad_token")

    @property
    def mask(self) -> int:
        return self._id("mask_token")

    @property
    def num_tokens(self) -> int:
        return len(self._tokenizer)

    @property
    def all(self) -> Tokens:
        return np.array(sorted(self._tokenizer.all_special_ids), dtype=np.int64)

    @property
    def sentinels(self) -> list[int]:
        """<extra_id_0> and so on, as far as there are any."""
        found = self._tokenizer.convert_tokens_to_ids([f"<extra_id_{number}>" for number in range(100)])
        unknown = self._tokenizer.unk_token_id
        return [number for number in found if number is not None and number != unknown]

    def _id(self, role: str) -> int:
        number = getattr(self._tokenizer, f"{role}_id")
        if number is None:
            raise ConfigError(
                f"the tokenizer has no {role}, which this objective needs; masked and sentence-order take a tokenizer "
                "of kind wordpiece or unigram, span-corruption one of kind unigram"
            )
        return int(number)


def _without(batch: dict[str, torch.Tensor], *names: str) -> dict[str, Any]:
    return {name: values for name, values in batch.items() if name not in names}


def _chooser(seed: int, row: Row) -> np.random.Generator:
    return np.random.default_rng([seed, *row.key])


def _mask(tokens: Tokens, share: float, special: SpecialIds, chooser: np.random.Generator) -> tuple[Tokens, Tokens]:
    """(inputs, labels), both like tokens [L]; special tokens are never chosen, and there is at least one label."""
    is_text = ~np.isin(tokens, special.all)
    draws = np.where(is_text, chooser.random(len(tokens)), 2.0)
    chosen = draws < max(share, np.nextafter(draws.min(), 2.0))
    chosen &= is_text
    labels = np.where(chosen, tokens, IGNORED)
    fates = chooser.random(len(tokens))
    inputs = np.where(chosen & (fates < 0.8), special.mask, tokens)
    anything = chooser.integers(0, special.num_tokens, size=len(tokens))
    return np.where(chosen & (fates >= 0.8) & (fates < 0.9), anything, inputs), labels


def _parts(total: int, number: int, chooser: np.random.Generator) -> list[int]:
    """`total` as `number` random parts of at least one."""
    cuts = np.sort(chooser.permutation(total - 1)[: number - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]])).astype(int).tolist()
