"""Distillation: students come nearer to the teacher by every loss, keep their zeros, and resume to the same bytes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastserve.checkpoint.folder import ModelFolder
from fastserve.compress.constraints import Masks
from fastserve.compress.distill import roll_out
from fastserve.compress.evaluate import compare
from fastserve.compress.grid import WeightScheme, fit, nearest
from fastserve.compress.losses import relation_loss, soft_loss
from fastserve.compress.network import load_dense
from fastserve.compress.recipe import Evaluation, make_recipe
from fastserve.compress.run import compress
from fastserve.compress.teacher import Wanted
from fastserve.core.errors import ConfigError
from tests import folders
from tests.encoder_decoder_folders import encoder_decoder
from tests.server_process import started
from tests.unit.compress.test_quantize import served_logits

pytestmark = pytest.mark.slow  # networks trained

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


def test_a_student_with_fewer_kinds_of_layers(text: Path, tmp_path: Path) -> None:
    source = folders.FAMILIES["gemma3"](tmp_path / "source")  # which lists three
    step = {**STEP, "steps": 1, "shape": {"num_hidden_layers": 2}}
    student = compress(str(source), tmp_path / "out", recipe(text, step))
    assert student.config["layer_types"] == ["sliding_attention", "full_attention"]
    served_logits(student.path)


def test_a_bias_of_the_logits_stays(text: Path, tmp_path: Path) -> None:
    source = ModelFolder.open(str(encoder_decoder(tmp_path / "source", "marian")))
    student = compress(str(source.path), tmp_path / "out", recipe(text, {**STEP, "steps": 1}))
    name, shape = "final_logits_bias", (1, folders.VOCAB_SIZE)
    assert torch.equal(student.weights.view(name, shape), source.weights.view(name, shape))
    assert sorted(student.weights.names()) == sorted(source.weights.names())


@pytest.mark.parametrize("kind", ["bert", "t5"])
@pytest.mark.parametrize("keys", [{"lora_rank": 4, "learning_rate": 1e-3}, {"sparsity": 0.2, "learning_rate": 5e-4}])
def test_other_networks_by_other_ways(
    models: dict[str, Path], text: Path, tmp_path: Path, kind: str, keys: dict[str, Any]
) -> None:
    prune = {"do": "prune", "method": "channels", "ratio": 0.5}
    before = compress(str(models[kind]), tmp_path / "before", recipe(text, prune))
    after = compress(str(models[kind]), tmp_path / "after", recipe(text, prune, {**STEP, **keys}))
    assert kl(models[kind], after, text) < kl(models[kind], before, text)


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


def test_a_cache_says_what_the_teacher_said(teacher: Path, text: Path, tmp_path: Path) -> None:
    step = {**STEP, "layers": [0, 3], "steps": 12, "cache": str(tmp_path / "cache"), "top": 8}
    first = compress(str(teacher), tmp_path / "first", recipe(text, step))
    files = sorted((tmp_path / "cache").glob("*.safetensors"))
    assert len(files) == 12
    times = [item.stat().st_mtime_ns for item in files]
    again = compress(str(teacher), tmp_path / "again", recipe(text, step))
    assert first.shards[0].read_bytes() == again.shards[0].read_bytes()
    assert times == [item.stat().st_mtime_ns for item in files]
    with pytest.raises(ConfigError, match="another recipe's answers"):
        compress(str(teacher), tmp_path / "other", recipe(text, {**step, "length": 24}))


def test_a_teacher_behind_a_server(teacher: Path, text: Path, tmp_path: Path) -> None:
    """The same student, but for rounding, as from the likeliest tokens of the folder."""
    step = {**STEP, "layers": [0, 3], "steps": 3, "top": 8}
    near = compress(str(teacher), tmp_path / "near", recipe(text, {**step, "cache": str(tmp_path / "cache")}))
    command = [sys.executable, "-m", "fastserve.cli.main", "serve", str(teacher), "--port", "0", "--dtype", "float32"]
    with started([*command, "--kernels", "reference", "--kv-cache-memory", "16MiB"]) as server:
        far = compress(str(teacher), tmp_path / "far", recipe(text, {**step, "teacher": server.url}))
    begun = compress(str(teacher), tmp_path / "begun", recipe(text, {**step, "steps": 1, "learning_rate": 1e-9}))
    name = "model.layers.1.mlp.up_proj.weight"
    values = [item.weights.view(name, item.weights.shape(name)) for item in (near, far, begun)]
    assert (values[0] - values[1]).abs().mean() < 0.05 * (values[0] - values[2]).abs().mean()


def test_no_server_is_there(teacher: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not answer"):
        compress(str(teacher), tmp_path / "out", recipe(text, {**STEP, "teacher": "http://127.0.0.1:9"}))


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_learning_from_its_own_texts(teacher: Path, text: Path, tmp_path: Path, divergence: str) -> None:
    step = {**STEP, "layers": [0, 3], "on_policy": 1.0, "divergence": divergence}
    blank = compress(str(teacher), tmp_path / "blank", recipe(text, {**step, "steps": 1, "learning_rate": 1e-9}))
    learnt = compress(str(teacher), tmp_path / "learnt", recipe(text, step))
    assert kl(teacher, learnt, text) < 0.8 * kl(teacher, blank, text)


def test_what_a_student_writes_goes_on_after_the_prompt(teacher: Path) -> None:
    model = load_dense(ModelFolder.open(str(teacher)))
    prompts = torch.randint(3, 50, (2, 5))
    found = roll_out(model, prompts, 7, torch.Generator().manual_seed(1))
    assert found.shape == (2, 12) and torch.equal(found[:, :5], prompts)
    ids = prompts
    draw = torch.Generator().manual_seed(1)
    for _ in range(7):  # the same without a cache
        shares = model.eval()(input_ids=ids).logits[:, -1].float().softmax(-1)
        ids = torch.cat([ids, torch.multinomial(shares, 1, generator=draw)], 1)
    assert torch.equal(found, ids)


def test_low_rank_mends_and_keeps_zeros(teacher: Path, text: Path, tmp_path: Path) -> None:
    prune = {"do": "prune", "method": "magnitude", "ratio": 0.6}
    before = compress(str(teacher), tmp_path / "before", recipe(text, prune))
    step = {**STEP, "lora_rank": 4, "learning_rate": 1e-2}
    after = compress(str(teacher), tmp_path / "after", recipe(text, prune, step))
    name = "model.layers.2.mlp.up_proj.weight"
    old, new = (item.weights.view(name, item.weights.shape(name)) for item in (before, after))
    assert torch.equal(old == 0, new == 0) and not torch.equal(old, new)
    assert kl(teacher, after, text) < 0.9 * kl(teacher, before, text)
    table = "model.embed_tokens.weight"
    assert torch.equal(*(item.weights.view(table, item.weights.shape(table)) for item in (before, after)))
    unpruned = compress(str(teacher), tmp_path / "unpruned", recipe(text, {**step, "layers": [0, 1, 2], "steps": 2}))
    whole = ModelFolder.open(str(teacher)).weights
    change = unpruned.weights.view(name, unpruned.weights.shape(name)) - whole.view(name, whole.shape(name))
    assert torch.linalg.matrix_rank(change) == 4


@pytest.mark.parametrize("schedule", ["cubic", "linear"])
def test_zeros_grow_on_a_schedule(teacher: Path, text: Path, tmp_path: Path, schedule: str) -> None:
    step = {**STEP, "steps": 60, "sparsity": 0.7, "sparsity_schedule": schedule}
    at_once = {"do": "prune", "method": "magnitude", "ratio": 0.7}
    grown = compress(str(teacher), tmp_path / "grown", recipe(text, step))
    name = "model.layers.2.mlp.up_proj.weight"
    zeros = grown.weights.view(name, grown.weights.shape(name)) == 0
    assert abs(float(zeros.float().mean()) - 0.7) < 0.01
    pruned = compress(str(teacher), tmp_path / "pruned", recipe(text, at_once))
    assert kl(teacher, grown, text) < kl(teacher, pruned, text)
    masks = Masks(torch.nn.Module(), make_recipe({"steps": [step], "calibration": {"text": "x"}}).steps[0])
    shares = [masks.share(number) for number in range(0, 60, 10)]
    assert shares == sorted(shares) and shares[0] < 0.5 and shares[-1] == pytest.approx(0.7)


def test_losses_are_zero_for_equals() -> None:
    logits, values = torch.randn(5, 9), torch.randn(2, 6, 8)
    assert soft_loss(logits, logits, 2.0) < 1e-6 < soft_loss(logits, -logits, 2.0)
    for divergence in ("reverse", "jsd"):
        assert soft_loss(logits, logits, 2.0, divergence) < 1e-6 < soft_loss(logits, -logits, 2.0, divergence)
    top = Wanted(*logits.topk(9))
    assert torch.allclose(soft_loss(-logits, top, 2.0), soft_loss(-logits, logits, 2.0), atol=1e-5)
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
        ({"cache": "here", "hidden": 1.0}, "need a teacher's folder"),
        ({"on_policy": 0.5, "cache": "here"}, "no cache"),
        ({"sparsity": 0.5, "lora_rank": 2}, "give one"),
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
