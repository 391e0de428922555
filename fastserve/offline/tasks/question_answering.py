"""Extractive question answering by SQuAD's rules: spans of a context, scored by the sum of two logits.

As the evaluation scripts of SQuAD do it (Devlin et al., 2018, section 4.2 and 4.3): a long context goes in overlapping
windows, each with the whole question; a span's score is its start logit plus its end logit; "no answer" has the score
of the first token, the least over the windows. The best n spans, and "no answer" where it may be one, share
probabilities by a softmax over their scores. A span that several windows see counts once, with its best score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers

from fastserve.core.errors import RequestError
from fastserve.offline.tasks.text import EncoderText, Floats, Job, piece, softmax

_NUM_BEST = 20
_MOST_SPECIAL = 4  # special tokens of a pair


@dataclass(frozen=True, slots=True)
class AnswerRules:
    """How answers are chosen.

    Attributes:
        top_k: answers wanted.
        max_answer_length: tokens of the longest answer.
        window: tokens of a window, question and special tokens included; 0: as many as the model takes.
        stride: tokens of the context that neighbouring windows share.
        may_be_impossible: whether "no answer" is one.
        no_answer_threshold: it is the answer when its score exceeds the best span's by more than this.
    """

    top_k: int = 1
    max_answer_length: int = 30
    window: int = 384
    stride: int = 128
    may_be_impossible: bool = False
    no_answer_threshold: float = 0.0

    def __post_init__(self) -> None:
        for name, low in (("top_k", 1), ("max_answer_length", 1), ("window", 0), ("stride", 0)):
            if getattr(self, name) < low:
                raise RequestError(f"{name} must be at least {low}, not {getattr(self, name)}", name)


def answer_question(text: EncoderText, question: str, context: str, rules: AnswerRules) -> Job:
    """The answers: a list of `{score, start, end, answer}` (characters of the context), best first; no answer is
    the empty one at 0.

    Raises:
        RequestError: an empty question or context, or one too long to leave room for the context.
    """
    text.check_task("question-answering")
    if not question.strip() or not context.strip():
        raise RequestError("give a question and a context, neither of them empty", "question")
    window = min(rules.window or text.max_length, text.max_length)
    stride = window_stride(rules.stride, window, len(text.tokenizer.encode(question, add_special_tokens=False)))
    windows = text.tokenizer.encode_parts(question, context, window, stride)

    def finish(scores: list[Floats]) -> list[dict[str, Any]]:
        return choose_answers(context, windows, scores, rules)

    return Job([piece(window) for window in windows], finish)


def window_stride(wanted: int, window: int, question_tokens: int) -> int:
    """Tokens that neighbouring windows share: as wanted, at most half a window, less where there is less room."""
    left = max(0, window - question_tokens - _MOST_SPECIAL)
    stride = min(wanted, window // 2)
    return stride if stride < left else left // 2


def choose_answers(
    context: str, windows: list[tokenizers.Encoding], scores: list[Floats], rules: AnswerRules
) -> list[dict[str, Any]]:
    """See `answer_question`; scores are start and end logits [T, 2] of each window."""
    best: dict[tuple[int, int], float] = {}
    nothing = min(float(rows[0, 0]) + float(rows[0, 1]) for rows in scores)
    for window, rows in zip(windows, scores, strict=True):
        for start, end, score in _best_spans(window, rows, rules):
            if score > best.get((start, end), -np.inf):
                best[start, end] = score
    spans = sorted(best.items(), key=lambda item: (-item[1], item[0]))[:_NUM_BEST]
    if not spans:
        return [_answer(context, 0, 0, 1.0)]
    is_impossible = rules.may_be_impossible and nothing - spans[0][1] > rules.no_answer_threshold
    candidates = [((0, 0), nothing)] if rules.may_be_impossible else []
    if is_impossible:
        candidates += spans
    else:  # "no answer" comes where its score puts it, but never before the first span
        candidates = sorted([*candidates, *spans[1:]], key=lambda item: -item[1])
        candidates = [spans[0], *candidates]
    shares = softmax(np.array([score for _, score in candidates], dtype=np.float32))
    return [_answer(context, *span, float(share)) for (span, _), share in zip(candidates, shares, strict=True)][
        : rules.top_k
    ]


def _best_spans(window: tokenizers.Encoding, rows: Floats, rules: AnswerRules) -> list[tuple[int, int, float]]:
    """The best spans of one window: first and last character of the context, and score."""
    inside = np.array([sequence == 1 for sequence in window.sequence_ids])
    places = np.flatnonzero(inside)
    if not len(places):
        return []
    starts, ends = rows[places, 0], rows[places, 1]
    longest = min(rules.max_answer_length, len(places))
    after = np.concatenate([ends, np.full(longest - 1, -np.inf, ends.dtype)])
    flat = (starts[:, None] + np.lib.stride_tricks.sliding_window_view(after, longest)).ravel()
    count = min(_NUM_BEST + rules.top_k, len(flat))
    order = np.argpartition(-flat, count - 1)[:count]
    found = []
    for index in order[np.isfinite(flat[order])]:
        first, further = divmod(int(index), longest)
        start, end = window.offsets[places[first]][0], window.offsets[places[first + further]][1]
        found.append((start, end, float(flat[index])))
    return found


def _answer(context: str, start: int, end: int, score: float) -> dict[str, Any]:
    answer = context[start:end]
    start += len(answer) - len(answer.lstrip())
    answer = answer.strip()
    return {"score": score, "start": start, "end": start + len(answer), "answer": answer}
