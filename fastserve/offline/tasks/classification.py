"""Scores of a sequence classifier: labels of a text or a pair, and one number for how well a pair fits."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastserve.core.errors import RequestError
from fastserve.offline.tasks.embeddings import cosine, embed
from fastserve.offline.tasks.text import EncoderText, Floats, Job, piece, sigmoid, softmax

FUNCTIONS = ("sigmoid", "softmax", "none")


def classify(
    text: EncoderText,
    inputs: list[tuple[str, str | None]],
    *,
    function: str = "",
    truncate: bool = False,
) -> Job:
    """Label scores of each text or pair: a list of [num_labels] float32, in the order of `text.labels`.

    Args:
        function: sigmoid, softmax or none; "" takes what the model was trained with, as transformers finds out:
            none for regression, sigmoid for several labels at once and for a single one, softmax else.
    """
    text.check_task("text-classification")
    apply = function or default_function(text)
    if apply not in FUNCTIONS:
        raise RequestError(
            f"function_to_apply must be one of {', '.join(FUNCTIONS)}, not {apply!r}", "function_to_apply"
        )

    def finish(scores: list[Floats]) -> list[Floats]:
        functions = {"sigmoid": sigmoid, "softmax": softmax}
        return [functions[apply](item) if apply in functions else item for item in scores]

    return Job([piece(text.encode(*item, truncate=truncate)) for item in inputs], finish)


def default_function(text: EncoderText) -> str:
    """What turns the model's scores into what is shown."""
    kind = text.config.get("problem_type")
    if kind == "regression":
        return "none"
    return "sigmoid" if kind == "multi_label_classification" or len(text.labels) == 1 else "softmax"


def labelled(text: EncoderText, scores: Floats, top_k: int | None = None) -> list[dict[str, Any]]:
    """The best `top_k` labels (all without it) with their scores, best first."""
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [{"label": text.labels[int(index)], "score": float(scores[index])} for index in order]


def score_pairs(text: EncoderText, pairs: list[tuple[str, str]], *, truncate: bool = False) -> Job:
    """How well the texts of each pair fit: a list of numbers.

    A classifier with one label reads both together (a cross-encoder; Nogueira and Cho, 2019); of any other encoder's
    vectors the cosine is taken.
    """
    if text.task != "text-classification":
        singles = list(dict.fromkeys(item for pair in pairs for item in pair))
        job = embed(text, singles, truncate=truncate)

        def compare(vectors: list[Floats]) -> list[float]:
            by_text = dict(zip(singles, job.finish(vectors), strict=True))
            return [cosine(by_text[first], by_text[second]) for first, second in pairs]

        return Job(job.pieces, compare)
    if len(text.labels) != 1:
        raise RequestError(
            f"this classifier has {len(text.labels)} labels; pairs are scored by a model with one label, or one for "
            "embeddings",
            "model",
        )
    given: list[tuple[str, str | None]] = list(pairs)
    job = classify(text, given, function=_pair_function(text), truncate=truncate)
    return Job(job.pieces, lambda scores: [float(item[0]) for item in job.finish(scores)])


def _pair_function(text: EncoderText) -> str:
    """Cross-encoders made by sentence-transformers say in config.json what follows their score."""
    settings = text.config.get("sentence_transformers") or {}
    named = settings.get("activation_fn") or text.config.get("sbert_ce_default_activation_function") or ""
    return {"Identity": "none", "Sigmoid": "sigmoid"}.get(str(named).rsplit(".", 1)[-1], "")
