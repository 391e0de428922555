from __future__ import annotations

import pytest

from fastserve.train.metrics import answer_scores, entity_scores, label_scores, text_scores


def test_answers_are_scored_as_squad_does() -> None:
    found = answer_scores(["The Eiffel tower!", "in 1889", ""], [["Eiffel Tower"], ["1889", "the year 1889"], []])
    assert found["exact_match"] == pytest.approx(200 / 3, abs=1e-3)
    assert found["f1"] == pytest.approx(100 * (1 + 2 / 3 + 1) / 3, abs=1e-3)
    assert answer_scores(["北京市。"], [["北京"]])["f1"] == pytest.approx(80)


def test_labels() -> None:
    found = label_scores(["a", "a", "b"], ["a", "b", "b"])
    assert found == {"accuracy": 66.667, "macro_f1": pytest.approx(66.667)}


def test_entities_count_as_wholes() -> None:
    truth = [["B-PER", "I-PER", "O", "B-LOC"]]
    assert entity_scores(truth, truth) == {"entity_f1": 100.0, "accuracy": 100.0}
    assert entity_scores([["B-PER", "O", "O", "B-LOC"]], truth) == {"entity_f1": 50.0, "accuracy": 75.0}


def test_texts() -> None:
    same = text_scores(["the cat sat on the mat today"], [["a dog", "the cat sat on the mat today"]])
    assert same == {"bleu": pytest.approx(100), "chrf": pytest.approx(100), "rouge_l": 100.0}
    assert text_scores(["我爱北京天安门广场"], [["我爱北京天安门广场"]])["bleu"] == pytest.approx(100)
    assert text_scores(["dogs"], [["the cat sat on the mat"]])["rouge_l"] == 0
