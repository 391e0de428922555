"""Labels of tokens, put together to entities: what transformers' token-classification does, with its names.

Long texts go in overlapping windows; each token's scores are then those of the window in which it stands furthest from
an end, so that there is one row of scores per token, however many windows saw it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers

from fastserve.core.errors import RequestError
from fastserve.offline.tasks.text import EncoderText, Floats, Job, piece, softmax

STRATEGIES = ("none", "simple", "first", "average", "max")


@dataclass(frozen=True, slots=True)
class _Token:
    """A token of the text with its label shares [num_labels]; `index` as transformers counts, special tokens too."""

    token_id: int
    word: str
    start: int
    end: int
    index: int
    is_subword: bool
    shares: Floats


def find_entities(
    text: EncoderText,
    sentence: str,
    *,
    strategy: str = "none",
    ignore_labels: tuple[str, ...] = ("O",),
    stride: int = 64,
) -> Job:
    """Entities of a text.

    Args:
        strategy: none (every token), simple (neighbours of one label; B- begins a new one), or first, average, max:
            words get one label first, by their first token, the mean of their tokens, or the surest token.
        stride: tokens that windows of a long text have in common.

    Returns:
        A Job for `[{entity or entity_group, score, word, start, end}, ...]`, with the token's index under "none".
    """
    text.check_task("token-classification")
    if strategy not in STRATEGIES:
        raise RequestError(f"aggregation_strategy must be one of {', '.join(STRATEGIES)}", "aggregation_strategy")
    stride = min(stride, text.max_length // 4)
    windows = text.tokenizer.encode_parts(sentence, None, text.max_length, stride)

    def finish(scores: list[Floats]) -> list[dict[str, Any]]:
        tokens = _tokens(text, sentence, windows, scores, stride)
        if strategy == "none":
            found = [_single(text, token) for token in tokens]
            return [item for item in found if item["entity"] not in ignore_labels]
        words = [[token] for token in tokens] if strategy == "simple" else _words(tokens)
        labelled = [_label(text, word, strategy) for word in words]
        return [item for item in _group(text, labelled) if item["entity_group"] not in ignore_labels]

    return Job([piece(window) for window in windows], finish)


def _tokens(
    text: EncoderText, sentence: str, windows: list[tokenizers.Encoding], scores: list[Floats], stride: int
) -> list[_Token]:
    best: dict[int, tuple[int, _Token]] = {}  # by place in the text: how far from an end, and the token
    inner = [place for place, is_special in enumerate(windows[0].special_tokens_mask) if not is_special]
    step = len(inner) - stride
    for number, (window, rows) in enumerate(zip(windows, scores, strict=True)):
        shares = softmax(rows)
        inner = [place for place, is_special in enumerate(window.special_tokens_mask) if not is_special]
        for place in inner:
            index, room = number * step + place, min(place - inner[0], inner[-1] - place)
            if index not in best or room > best[index][0]:
                best[index] = (room, _token(text, sentence, window, place, index, shares[place]))
    return [best[index][1] for index in sorted(best)]


def _token(
    text: EncoderText, sentence: str, window: tokenizers.Encoding, place: int, index: int, shares: Floats
) -> _Token:
    token_id, word, (start, end) = window.ids[place], window.tokens[place], window.offsets[place]
    written = sentence[start:end]
    if text.tokenizer.has_subword_prefix:
        is_subword = len(word) != len(written)
    else:  # a guess: no space around the token's beginning
        is_subword = start > 0 and " " not in sentence[start - 1 : start + 1]
    if word == text.tokenizer.special_tokens.get("unk_token"):
        word, is_subword = written, False
    return _Token(token_id, word, start, end, index, is_subword, shares)


def _single(text: EncoderText, token: _Token) -> dict[str, Any]:
    best = int(token.shares.argmax())
    return {
        "entity": text.labels[best],
        "score": float(token.shares[best]),
        "index": token.index,
        "word": token.word,
        "start": token.start,
        "end": token.end,
    }


def _words(tokens: list[_Token]) -> list[list[_Token]]:
    words: list[list[_Token]] = []
    for token in tokens:
        if words and token.is_subword:
            words[-1].append(token)
        else:
            words.append([token])
    return words


def _label(text: EncoderText, word: list[_Token], strategy: str) -> tuple[str, float, list[_Token]]:
    """Label and score of a word."""
    shares = word[0].shares
    if strategy == "max":
        shares = max(word, key=lambda token: float(token.shares.max())).shares
    elif strategy == "average":
        shares = np.mean([token.shares for token in word], axis=0)
    best = int(shares.argmax())
    return text.labels[best], float(shares[best]), word


def _group(text: EncoderText, labelled: list[tuple[str, float, list[_Token]]]) -> list[dict[str, Any]]:
    """Neighbours of one kind together; B- begins another one."""
    groups: list[tuple[str, list[float], list[_Token]]] = []
    for label, score, word in labelled:
        begins, kind = label.startswith("B-"), label[2:] if label[:2] in ("B-", "I-") else label
        if groups and groups[-1][0] == kind and not begins:
            groups[-1][1].append(score)
            groups[-1][2].extend(word)
        else:
            groups.append((kind, [score], list(word)))
    return [
        {
            "entity_group": kind,
            "score": float(np.mean(scores)),
            "word": text.tokenizer.decode([token.token_id for token in tokens], skip_special_tokens=False),
            "start": tokens[0].start,
            "end": tokens[-1].end,
        }
        for kind, scores, tokens in groups
    ]
