"""Distillation: students come nearer to the teacher by every loss, keep their zeros, and resume to the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastserve.checkpoint.folder import ModelFolder
from fastserve.compress.evaluate import compare
from fastserve.compress.grid import WeightScheme, fit, nearest
from fastserve.compress.losses import relation_loss, soft_loss
from fastserve.compress.recipe import Evaluation, make_recipe
from fastserve.compress.run import compress
from fastserve.core.errors import ConfigError
from tests import folders
from tests.unit.compress.test_quantize import served_logits

STEP = {"do": "distill", "steps": 30, "batch_size": 4, "length": 32, "learning_rate": 3e-3, "hard": 0.0}


def recipe(text: Path | str, *steps: dict[str, Any]) -> Any:
    return make_recipe({"steps": list(steps), "calibration": {"text": str(text), "samples": 4, "length": 32}})


def kl(teacher: Path, student: ModelFolder, text: Path) -> float:
    settings = Evaluation(str(text), tokens=512, length=32)
    return compare(ModelFolder.open(str(teacher)), student, settings, lambda *_: None).kl


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.llama(tmp_path_factory.mktemp("teacher") / "m", num_hidden_layers=4, embedding_deviation=0.2)


@pytest.mark.parametrize(
    "losses",
    [
        {"soft": 1.0, "hard": 0.0},
        {"soft": 1.0, "hard": 0.0, "hidden": 1.0},
        {"soft": 1.0, "hard": 0.0, "attention": 1.0},
    ],
    ids=["soft", "hidden", "attention"],
)
def test_a_student_of_fewer_layers_learns(teacher: Path, text: Path, tmp_path: Path, losses: dict[str, float]) -> None:
    blank = {**STEP, "steps": 1, "learning_rate": 1e-9, "layers": [0, 3]}
    begun = compress(str(teacher), tmp_path / "begun", recipe(text, blank))
    assert begun.config["num_hidden_layers"] == 2
    learnt = compress(str(teacher), tmp_path / "learnt", recipe(text, {**STEP, **losses, "layers": [0, 3]}))
    assert kl(teacher, learnt, text) < 0.7 * kl(teacher, begun, text)
    served_logits(learnt.path)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["begun", "learnt"]


def test_a_student_of_another_shape(teacher: Path, text: Path, tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    step = {**STEP, "shape": shape, "hidden": 1.0}
    student = compress(str(teacher), tmp_path / "out", recipe(text, step))
    assert student.config["hidden_size"] == 32
    assert student.weights.shape("model.embed_tokens.weight") == (folders.VOCAB_SIZE, 32)
    served_logits(student.path)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_other_networks(models: dict[str, Path], text: Path, tmp_path: Path, kind: str) -> None:
    prune = {"do": "prune", "method": "channels", "ratio": 0.5}
    before = compress(str(models[kind]), tmp_path / "before", recipe(text, prune))
    after = compress(
        str(models[kind]), tmp_path / "after", recipe(text, prune, {**STEP, "learning_rate": 5e-4, "attention": 0.01})
    )
    assert kl(models[kind], after, text) < kl(models[kind], before, text)


def test_zeros_stay_zeros_while_a_pruned_model_mends(teacher: Path, text: Path, tmp_path: Path) -> None:
    prune = {"do": "prune", "method": "magnitude", "ratio": 0.6}
    before = compress(str(teacher), tmp_path / "before", recipe(text, prune))
    after = compress(str(teacher), tmp_path / "after", recipe(text, prune, STEP))
    name = "model.layers.2.mlp.up_proj.weight"
    old, new = (item.weights.view(name, item.weights.shape(name)) for item in (before, after))
    assert torch.equal(old == 0, new == 0) and not torch.equal(old, new)
    assert kl(teacher, after, text) < 0.8 * kl(teacher, before, text)


def test_rounding_in_training_pays(teacher: Path, text: Path, tmp_path: Path) -> None:
    quantize = {"do": "quantize", "bits": 3, "group_size": 32, "search": False}
    plain = compress(str(teacher), tmp_path / "plain", recipe(text, quantize))
    aware = compress(str(teacher), tmp_path / "aware", recipe(text, {**STEP, "bits": 3, "group_size": 32}, quantize))
    assert kl(teacher, aware, text) < 0.8 * kl(teacher, plain, text)
    name = "model.layers.2.mlp.up_proj"
    assert f"{name}.weight_packed" in aware.weights
    weight = torch.randn(8, 32)
    scheme = WeightScheme(3, 32)
    once = nearest(weight, fit(weight, scheme)).dequantize()
    assert not torch.equal(once, weight)


def test_an_interrupted_training_ends_with_the_same_bytes(teacher: Path, text: Path, tmp_path: Path) -> None:
    wanted = recipe(text, {**STEP, "steps": 60, "layers": [0, 1]})
    whole = compress(str(teacher), tmp_path / "whole", wanted)

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("distill", 55):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(str(teacher), tmp_path / "again", wanted, interrupt)
    seen = []
    again = compress(str(teacher), tmp_path / "again", wanted, lambda stage, done, _: seen.append((stage, done)))
    assert ("distill", 49) not in seen and ("distill", 50) in seen
    assert again.shards[0].read_bytes() == whole.shards[0].read_bytes()


def test_losses_are_zero_for_equals() -> None:
    logits, values = torch.randn(5, 9), torch.randn(2, 6, 8)
    assert soft_loss(logits, logits, 2.0) < 1e-6 < soft_loss(logits, -logits, 2.0)
    assert relation_loss(values, values) < 1e-6 < relation_loss(values, torch.randn(2, 6, 4))


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"soft": 0.0, "hard": 0.0}, "all weights"),
        ({"text": "none.txt"}, "is no file"),
        ({"shape": {"depth": 3}}, "depth"),
        ({"shape": {"hidden_size": 32}, "layers": [0]}, "random weights"),
        ({"temperature": 0.0}, "temperature"),
        ({"layers": [9]}, "layer 9"),
    ],
)
def test_what_cannot_be_distilled(
    teacher: Path, text: Path, tmp_path: Path, step: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compress(str(teacher), tmp_path / "out", recipe(text, {**STEP, **step}))
    assert not list(tmp_path.iterdir())


def test_a_student_of_another_vocabulary(teacher: Path, text: Path, tmp_path: Path) -> None:
    student = folders.llama(tmp_path / "student", vocab_size=330)
    with pytest.raises(ConfigError, match="the student has 330 tokens"):
        compress(str(teacher), tmp_path / "out", recipe(text, {**STEP, "student": str(student)}))
