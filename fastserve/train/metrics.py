"""Scores of answers, labels, translations and summaries, as their fields define them.

Question answering: SQuAD's exact match and F1 (Rajpurkar et al. 2016, section 6), with a Chinese or Japanese character
as a word of its own (as in CMRC 2018). Translation and summarisation: sacrebleu's BLEU and chrF, rouge_score's ROUGE.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_IDEOGRAPH = re.compile("([\u3040-\u30ff\u3400-\u9fff])")
_PUNCTUATION = set(string.punctuation) | set("，。！？；：、“”‘’（）《》…")  # noqa: RUF001 - Chinese marks


def answer_words(text: str) -> list[str]:
    """The words that count: lower case, without punctuation and articles."""
    kept = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return _IDEOGRAPH.sub(r" \1 ", _ARTICLES.sub(" ", kept)).split()


def answer_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`exact_match` and `f1` in percent, each prediction against its best reference; without one, "" is right."""
    exact = overlap = 0.0
    for prediction, answers in zip(predictions, references, strict=True):
        words = answer_words(prediction)
        wanted = [answer_words(answer) for answer in answers] or [[]]
        exact += max(words == other for other in wanted)
        overlap += max(_f1(words, other) for other in wanted)
    return _percent({"exact_match": exact, "f1": overlap}, len(predictions))


def label_scores(predictions: Sequence[Hashable], labels: Sequence[Hashable]) -> dict[str, float]:
    """`accuracy` and `macro_f1` (the mean over the labels that occur) in percent."""
    hits = Counter(label for found, label in zip(predictions, labels, strict=True) if found == label)
    found, wanted = Counter(predictions), Counter(labels)
    f1 = sum(2 * hits[label] / (found[label] + wanted[label]) for label in wanted) / max(1, len(wanted))
    return {**_percent({"accuracy": float(sum(hits.values()))}, len(labels)), "macro_f1": round(100 * f1, 3)}


def entity_scores(predictions: Sequence[Sequence[str]], labels: Sequence[Sequence[str]]) -> dict[str, float]:
    """`entity_f1` of whole spans in BIO labels, and `accuracy` of single words, in percent."""
    right = found = wanted = words = hits = 0
    for prediction, truth in zip(predictions, labels, strict=True):
        ours, theirs = set(_entities(prediction)), set(_entities(truth))
        right, found, wanted = right + len(ours & theirs), found + len(ours), wanted + len(theirs)
        hits += sum(one == other for one, other in zip(prediction, truth, strict=True))
        words += len(truth)
    f1 = 2 * right / (found + wanted) if found + wanted else 1.0
    return {"entity_f1": round(100 * f1, 3), **_percent({"accuracy": float(hits)}, words)}


def text_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`bleu`, `chrf` and `rouge_l` (F-measure, the best reference) of generated texts, 0 to 100."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    width = max(map(len, references))
    streams = [[answers[min(index, len(answers) - 1)] for answers in references] for index in range(width)]
    # Chinese has no spaces to find words by; sacrebleu's own tokenizer for it takes characters.
    is_chinese = sum(len(_IDEOGRAPH.findall(answers[0])) for answers in references) > sum(
        len(answers[0].split()) for answers in references
    )
    scorer = RougeScorer(["rougeL"], use_stemmer=False, tokenizer=_Words())
    rouge = sum(
        max(scorer.score(answer, prediction)["rougeL"].fmeasure for answer in answers)
        for prediction, answers in zip(predictions, references, strict=True)
    )
    return {
        "bleu": round(sacrebleu.corpus_bleu(predictions, streams, tokenize="zh" if is_chinese else "13a").score, 3),
        "chrf": round(sacrebleu.corpus_chrf(predictions, streams).score, 3),
        **_percent({"rouge_l": rouge}, len(predictions)),
    }


class _Words:
    """Words as `answer_words` finds them, with articles: rouge_score's own tokenizer drops all but ASCII."""

    def tokenize(self, text: str) -> list[str]:
        return _IDEOGRAPH.sub(r" \1 ", re.sub(r"[^\w]+", " ", text.lower())).split()


def _f1(words: list[str], wanted: list[str]) -> float:
    if not words or not wanted:
        return float(words == wanted)
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted))


def _entities(labels: Sequence[str]) -> list[tuple[str, int, int]]:
    """(kind, first, end) of each span; an I- that continues nothing begins a span."""
    spans: list[tuple[str, int, int]] = []
    for index, label in enumerate(labels):
        mark, _, kind = label.partition("-")
        if mark == "I" and spans and spans[-1][0] == kind and spans[-1][2] == index:
            spans[-1] = (kind, spans[-1][1], index + 1)
        elif mark in ("B", "I"):
            spans.append((kind, index, index + 1))
    return spans


def _percent(sums: dict[str, float], number: int) -> dict[str, float]:
    return {name: round(100 * value / max(1, number), 3) for name, value in sums.items()}
