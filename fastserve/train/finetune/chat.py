"""Conversations: instruction tuning with loss on answers alone, and preferences between two answers (DPO).

Source of DPO: Rafailov et al. 2023, "Direct Preference Optimization", equation 7.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastserve.core.errors import ConfigError
from fastserve.train.finetune.examples import Example, value_of
from fastserve.train.finetune.settings import FinetuneSettings
from fastserve.train.finetune.task import Encoded, batches_of, on_device, padded
from fastserve.train.objectives import IGNORED, Batch, label_loss, num_labels

if TYPE_CHECKING:
    import torch

Messages = list[dict[str, str]]
_log = logging.getLogger(__name__)
_SCORE_BATCH = 8
_LOOK_AHEAD = 64  # conversations looked through to fill a row


class Instruction:
    """Rows have messages, prompt and completion, or instruction, input and output. Only answers are learnt.

    A row with nothing but `text` is learnt as a whole: pieces of what the model was pretrained on keep it from
    forgetting.
    """

    network_class = "AutoModelForCausalLM"

    def __init__(self, tokenizer: Any, settings: FinetuneSettings) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        _set_template(tokenizer, settings)

    def configure(self, config: Any, rows: list[Example]) -> None:
        if all(map(_is_text, rows)):
            messages_of(rows[0])  # says what a conversation needs

    def use_labels(self, config: Any) -> None:
        pass

    def encode(self, rows: list[Example]) -> list[Encoded]:
        items = [
            self._text(str(value_of(row, "text"))) if _is_text(row) else self._conversation(messages_of(row))
            for row in rows
        ]
        kept = [item for item in items if any(label != IGNORED for label in item["labels"])]
        length, lost = self._settings.max_length, len(items) - len(kept)
        if not kept:
            raise ConfigError(f"no conversation has an answer within max_length ({length} tokens)")
        if lost:
            _log.warning("left out: %d of %d conversations, with no answer in %d tokens", lost, len(items), length)
        return _packed(kept, length) if self._settings.packing else kept

    def batch(self, items: list[Encoded]) -> Batch:
        """Conversations that end a row early are followed by padding with positions of its own."""
        batch = padded(items, {"input_ids": self._tokenizer.pad_token_id or 0, "position_ids": 0})
        return batch

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = batch.pop("labels")
        return label_loss(model(**batch, use_cache=False).logits, labels)

    def score(self, network: Any, rows: list[Example]) -> dict[str, float]:
        """Mean loss per token of the answers."""
        total, count = 0.0, 0
        for items in batches_of(self.encode(rows), _SCORE_BATCH):
            batch = self.batch(items)
            count += num_labels(batch)
            total += float(self.loss(network, on_device(batch, network)))
        return {"held_out_loss": round(total / max(1, count), 6)}

    def _conversation(self, messages: Messages) -> Encoded:
        return self._learnt(*render(self._tokenizer, messages))

    def _text(self, text: str) -> Encoded:
        begin = self._tokenizer.bos_token_id
        ids = [*([] if begin is None else [begin]), *self._tokenizer.encode(text, add_special_tokens=False)]
        return self._learnt(ids, [True] * len(ids))

    def _learnt(self, ids: list[int], is_answer: list[bool]) -> Encoded:
        """Inputs and labels, one token apart; what max_length cuts is lost."""
        ids, is_answer = ids[: self._settings.max_length + 1], is_answer[: self._settings.max_length + 1]
        labels = [number if learnt else IGNORED for number, learnt in zip(ids[1:], is_answer[1:], strict=True)]
        return {"input_ids": ids[:-1], "position_ids": list(range(len(ids) - 1)), "labels": labels}


class Preference:
    """Rows have prompt (text or messages), chosen and rejected. The network is compared with itself at the beginning.

    The reference's log probabilities are computed once, when the run begins or is taken up, by `prepare`.
    """

    network_class = "AutoModelForCausalLM"

    def __init__(self, tokenizer: Any, settings: FinetuneSettings) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self._reference: dict[str, tuple[float, float]] = {}
        _set_template(tokenizer, settings)

    def configure(self, config: Any, rows: list[Example]) -> None:
        pass

    def use_labels(self, config: Any) -> None:
        pass

    def prepare(self, network: Any, rows: list[Example]) -> None:
        """Remember what the network, before any step, thinks of all pairs."""
        import torch

        for items in batches_of(self.encode(rows), _SCORE_BATCH):
            with torch.no_grad():
                found = self._log_probabilities(network, on_device(self._answers(items), network)).cpu().tolist()
            for index, item in enumerate(items):
                self._reference[_key(item)] = (found[2 * index], found[2 * index + 1])

    def encode(self, rows: list[Example]) -> list[Encoded]:
        items = []
        for row in rows:
            asked = _turns(value_of(row, "prompt"), "user")
            pair = {}
            for side in ("chosen", "rejected"):
                answer = _turns(value_of(row, side), "assistant")[-1]
                ids, is_answer = render(self._tokenizer, [*asked, {**answer, "role": "assistant"}])
                ids, is_answer = ids[: self._settings.max_length], is_answer[: self._settings.max_length]
                pair[side] = ids
                pair[f"{side}_labels"] = [
                    number if learnt else IGNORED for number, learnt in zip(ids, is_answer, strict=True)
                ]
            items.append(pair)
        return items

    def batch(self, items: list[Encoded]) -> Batch:
        """Chosen and rejected in turns, [2 B, L]; `labels [B]` counts pairs, `references [B]` is their known margin."""
        margins = [self._reference[_key(item)] for item in items]
        return {
            **self._answers(items),
            "labels": np.zeros(len(items), dtype=np.int64),
            "references": np.array([chosen - rejected for chosen, rejected in margins], dtype=np.float32),
        }

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return -self._log_sigmoid(self._margins(model, batch)).sum()

    def score(self, network: Any, rows: list[Example]) -> dict[str, float]:
        """Share of pairs that the network, against its beginning, moved towards the chosen answer; and the loss."""
        total, right, count = 0.0, 0, 0
        for items in batches_of(self.encode(rows), _SCORE_BATCH):
            margins = self._margins(network, on_device(self.batch(items), network))
            total -= float(self._log_sigmoid(margins).sum())
            right += int((margins > 0).sum())
            count += len(items)
        return {"preferred": round(100 * right / count, 3), "held_out_loss": round(total / count, 6)}

    def _answers(self, items: list[Encoded]) -> Batch:
        flat = [
            {"input_ids": item[side], "answer_labels": item[f"{side}_labels"], "attention_mask": [1] * len(item[side])}
            for item in items
            for side in ("chosen", "rejected")
        ]
        return padded(flat, {"input_ids": self._tokenizer.pad_token_id or 0, "answer_labels": IGNORED})

    def _margins(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        found = self._log_probabilities(model, batch)
        return self._settings.beta * (found[0::2] - found[1::2] - batch["references"])

    def _log_probabilities(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """[2 B] of each answer given its prompt."""
        import torch

        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        labels = batch["answer_labels"][:, 1:]
        losses = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        return -losses.sum(-1)

    @staticmethod
    def _log_sigmoid(margins: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.nn.functional.logsigmoid(margins)


def _is_text(row: Example) -> bool:
    return set(row) == {"text"}


def messages_of(row: Example) -> Messages:
    """A row of any of the known forms as messages."""
    if "messages" in row:
        return _turns(row["messages"], "user")
    if "prompt" in row and "completion" in row:
        asked, answer = row["prompt"], row["completion"]
    elif "instruction" in row and "output" in row:
        asked, answer = "\n\n".join(filter(None, [row["instruction"], row.get("input")])), row["output"]
    else:
        raise ConfigError(
            f"a conversation needs messages, prompt and completion, or instruction and output; it has {', '.join(row)}"
        )
    return [*_turns(asked, "user"), *_turns(answer, "assistant")]


def _turns(said: Any, role: str) -> Messages:
    """A text as the message of `role`, messages as they are; ConfigError for anything else."""
    messages = [{"role": role, "content": said}] if isinstance(said, str) else said
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"a conversation needs a text or a list of messages where it has {said!r:.100}")
    for message in messages:
        known = message if isinstance(message, dict) else {}
        if not known.get("role") or (known.get("content") is None and not known.get("tool_calls")):
            raise ConfigError(
                f"a message needs role (system, user or assistant) and content; rename the keys of {message!r:.100}"
            )
    return messages


def render(tokenizer: Any, messages: Messages) -> tuple[list[int], list[bool]]:
    """Token ids as the chat template writes the conversation, and which of them an assistant writes, ends included.

    ConfigError for a template that refuses the conversation, or whose beginnings are no beginnings of the whole.
    """
    if messages[0]["role"] == "assistant":
        raise ConfigError("a conversation begins with an answer; put what it answers before it")
    text = _written(tokenizer, messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _written(tokenizer, messages[:index], add_generation_prompt=True)
            after = _written(tokenizer, messages[: index + 1])
            if not (text.startswith(before) and text.startswith(after)):
                raise ConfigError("this chat template rewrites earlier turns, so answers cannot be told from requests")
            spans.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    is_answer = [any(start < last and end > first for first, last in spans) for start, end in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), is_answer


def _written(tokenizer: Any, messages: Messages, **options: Any) -> str:
    """The text that the chat template makes of messages."""
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return text
    except (TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ConfigError(
            f"the chat template refuses a conversation ({roles}): {error}; change the example, or give another "
            "template with --chat-template"
        ) from error


def _packed(items: list[Encoded], length: int) -> list[Encoded]:
    """Whole conversations laid into rows of at most `length` tokens; positions begin again with each."""
    waiting, rows = list(items), []
    while waiting:
        room, chosen = length, []
        for index, item in enumerate(waiting[:_LOOK_AHEAD]):
            if len(item["input_ids"]) <= room:
                room -= len(item["input_ids"])
                chosen.append(index)
        row = [waiting[index] for index in chosen]
        for index in reversed(chosen):
            del waiting[index]
        rows.append({key: [value for item in row for value in item[key]] for key in row[0]})
    return rows


def _set_template(tokenizer: Any, settings: FinetuneSettings) -> None:
    if settings.chat_template:
        try:
            tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read the chat template {settings.chat_template}: {error.strerror}") from error
    if not tokenizer.chat_template:
        raise ConfigError("the model has no chat template; give a file with --chat-template")


def _key(item: Encoded) -> str:
    return f"{item['chosen']}|{item['rejected']}"
