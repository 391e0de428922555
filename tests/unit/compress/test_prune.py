"""Pruning: the zeros that were asked for, and smaller networks that still say nearly the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fastserve.checkpoint import bitmask
from fastserve.checkpoint.folder import ModelFolder
from fastserve.checkpoint.weights import WeightReader
from fastserve.compress import low_rank, sparse, structure
from fastserve.compress.activations import InputStatistics
from fastserve.compress.network import load_dense
from fastserve.compress.recipe import make_recipe
from fastserve.compress.run import compress
from fastserve.core.errors import CheckpointError, ConfigError
from fastserve.models.encoder import RaggedBatch
from fastserve.models.encoder_loader import load_encoder
from fastserve.models.loader import load_model
from tests import folders
from tests.encoder_decoder_folders import encoder_decoder
from tests.encoder_folders import encoder
from tests.paged_driver import decode_from_source
from tests.unit.compress.test_grid import WEIGHT, inputs
from tests.unit.compress.test_quantize import IDS, logits, served_logits


def recipe(text: Path | None, *steps: dict[str, Any]) -> Any:
    calibration = {"text": str(text or ""), "samples": 6, "length": 48, "batch_size": 4}
    return make_recipe({"steps": list(steps), "calibration": calibration})


@pytest.mark.parametrize("is_2_of_4", [False, True])
def test_zeros_by_each_method(is_2_of_4: bool) -> None:
    x = inputs()
    moments = x.t() @ x / len(x)
    found = {
        "magnitude": sparse.magnitude(WEIGHT, 0.5, is_2_of_4),
        "wanda": sparse.wanda(WEIGHT, moments.diagonal().sqrt(), 0.5, is_2_of_4),
        "sparsegpt": sparse.sparsegpt(WEIGHT, moments, 0.5, is_2_of_4),
    }
    losses = {}
    for name, weight in found.items():
        zeros = weight == 0
        assert int(zeros.sum()) == WEIGHT.numel() // 2
        if is_2_of_4:
            assert (zeros.view(len(WEIGHT), -1, 4).sum(-1) == 2).all()
        losses[name] = float((x @ (weight - WEIGHT).t()).square().mean())
    assert losses["sparsegpt"] < 0.9 * losses["wanda"] and losses["wanda"] < 0.9 * losses["magnitude"]


def test_a_refit_makes_up_for_inputs_that_depend_on_others() -> None:
    x = inputs()
    x[:, 40:] = x[:, :24] * 2  # nothing is lost without these
    known = InputStatistics(64)
    known.add(x)
    linear = nn.Linear(64, 48, bias=False).requires_grad_(False)
    before = linear(x)
    structure.refit(linear, known, torch.arange(40))
    assert (linear(x[:, :40]) - before).square().mean() < 1e-3 * before.square().mean()


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_folder_with_zeros(models: dict[str, Path], text: Path, tmp_path: Path, method: str, kind: str) -> None:
    step = {"do": "prune", "method": method, "pattern": "2:4"}
    folder = compress(str(models[kind]), tmp_path / "out", recipe(text, step))
    names = [
        name
        for name in folder.weights.names()
        if name.endswith((".wo.weight", "down_proj.weight", "output.dense.weight"))
    ]
    assert names
    for name in names:
        assert (
            int((folder.weights.view(name, folder.weights.shape(name)) == 0).sum()) * 2
            == folder.weights.view(name, folder.weights.shape(name)).numel()
        )
    assert torch.isfinite(logits(load_dense(folder), folder)).all()


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_zeros_left_out_of_the_file(models: dict[str, Path], text: Path, tmp_path: Path, kind: str) -> None:
    step = {"do": "prune", "method": "wanda", "ratio": 0.8}
    dense = compress(str(models[kind]), tmp_path / "dense", recipe(text, step))
    short = compress(str(models[kind]), tmp_path / "short", recipe(text, {**step, "store": "bitmask"}))
    assert torch.equal(logits(load_dense(dense), dense), logits(load_dense(short), short))
    assert any(name.endswith(".bitmask") for name in short.weights.names())
    linears = [name for name in dense.weights.names() if f"{name.removesuffix('.weight')}.bitmask" in short.weights]
    sizes = [dense.weights.info(name) for name in linears]
    saved = dense.weight_bytes - short.weight_bytes
    assert saved > 0.6 * sum(info.end - info.start for info in sizes)
    if kind == "llama":
        assert torch.equal(served_logits(dense.path), served_logits(short.path))


def test_an_interrupted_run_with_zeros_left_out(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    wanted = recipe(text, {"do": "prune", "method": "sparsegpt", "ratio": 0.6, "store": "bitmask"})
    whole = compress(str(models["llama"]), tmp_path / "whole", wanted)

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("prune", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(str(models["llama"]), tmp_path / "again", wanted, interrupt)
    again = compress(str(models["llama"]), tmp_path / "again", wanted)
    assert [item.read_bytes() for item in again.shards] == [item.read_bytes() for item in whole.shards]


@pytest.mark.parametrize("columns", [1, 8, 13, 64])
def test_a_bitmask_holds_any_matrix(tmp_path: Path, columns: int) -> None:
    weight = torch.randn(5, columns).bfloat16() * (torch.rand(5, columns) < 0.4)
    weight[2] = 0
    tensors = bitmask.pack("m", weight)
    assert sum(item.nbytes for item in tensors.values()) == bitmask.packed_bytes(weight)
    save_file(tensors, tmp_path / "a.safetensors")
    assert torch.equal(bitmask.read(WeightReader([tmp_path / "a.safetensors"]), "m", (5, columns)), weight)
    tensors["m.bitmask"][0, 0] ^= 1
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="m is damaged"):
        bitmask.read(WeightReader([tmp_path / "b.safetensors"]), "m", (5, columns))


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_fewer_channels(models: dict[str, Path], text: Path, tmp_path: Path, kind: str) -> None:
    source = ModelFolder.open(str(models[kind]))
    step = {"do": "prune", "method": "channels", "ratio": 0.25}
    folder = compress(str(source.path), tmp_path / "out", recipe(text, step))
    key = "d_ff" if kind == "t5" else "intermediate_size"
    assert folder.config[key] == 96
    before, after = logits(load_dense(source), source), logits(load_dense(folder), folder)
    assert torch.nn.functional.cosine_similarity(before, after).mean() > 0.7
    if kind == "llama":
        assert torch.allclose(served_logits(folder.path)[-1], after[-1], atol=1e-3)


@pytest.mark.parametrize(
    ("heads", "groups", "ratio", "expected"),
    [(16, 8, 0.3, (6, 2)), (32, 8, 0.25, (8, 3)), (8, 8, 0.3, (6, 1)), (32, 4, 0.3, (4, 6)), (16, 8, 0.1, (7, 2))],
)
def test_heads_go_in_the_way_that_comes_nearest(
    heads: int, groups: int, ratio: float, expected: tuple[int, int]
) -> None:
    config = {"model_type": "qwen3", "hidden_size": 1024, "head_dim": 64}
    config |= {"num_attention_heads": heads, "num_key_value_heads": groups}
    plan = structure.HeadPlan.make(config, ratio)
    assert (plan.kept_groups, plan.kept_in_group) == expected


def test_heads_of_a_llama_divide_its_hidden_size() -> None:
    config = {"model_type": "llama", "hidden_size": 1024, "head_dim": 64}
    config |= {"num_attention_heads": 16, "num_key_value_heads": 8}
    plan = structure.HeadPlan.make(config, 0.3)
    assert (plan.kept_groups, plan.kept_in_group) == (8, 1)
    with pytest.raises(ConfigError, match="leaves out none"):
        structure.HeadPlan.make(config, 0.2)


def test_fewer_heads(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    for heads, groups, ratio, expected in ((4, 2, 0.5, (2, 2)), (4, 4, 0.5, (2, 2)), (8, 4, 0.3, (4, 4))):
        source = folders.llama(
            tmp_path / f"source{heads}-{groups}", num_attention_heads=heads, num_key_value_heads=groups
        )
        step = {"do": "prune", "method": "heads", "ratio": ratio}
        folder = compress(str(source), tmp_path / f"out{heads}-{groups}", recipe(text, step))
        assert (folder.config["num_attention_heads"], folder.config["num_key_value_heads"]) == expected
        assert folder.config["head_dim"] == 64 // heads
        after = logits(load_dense(folder), folder)
        assert torch.allclose(served_logits(folder.path)[-1], after[-1], atol=1e-3)
    for kind in ("bert", "t5"):
        with pytest.raises(ConfigError, match="like Llama's alone"):
            compress(str(models[kind]), tmp_path / kind, recipe(text, {"do": "prune", "method": "heads"}))


def test_merged_keys_and_values(text: Path, tmp_path: Path) -> None:
    """Where two heads have the same keys and values already, one does as well."""
    from safetensors.torch import load_file, save_file

    source = folders.llama(tmp_path / "source", num_attention_heads=4, num_key_value_heads=4)
    tensors = load_file(source / "model.safetensors")
    for name, values in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            heads = values.view(2, 2, 16, -1)
            heads[:, 1] = heads[:, 0]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    step = {"do": "prune", "method": "kv-heads", "ratio": 0.5}
    folder = compress(str(source), tmp_path / "out", recipe(None, step))
    assert folder.config["num_key_value_heads"] == 2
    assert torch.allclose(served_logits(source)[-1], served_logits(folder.path)[-1], atol=1e-3)
    with pytest.raises(ConfigError, match=r"model\.decoder\.layers\.0 has no self_attn\.o_proj"):
        compress(str(folders.FAMILIES["opt"](tmp_path / "opt")), tmp_path / "none", recipe(None, step))
    with pytest.raises(ConfigError, match="norms the queries or keys of all heads together"):
        compress(str(folders.FAMILIES["olmo2"](tmp_path / "olmo2")), tmp_path / "none", recipe(None, step))


def test_the_layer_that_does_nothing_goes(text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = folders.llama(tmp_path / "source", num_hidden_layers=4)
    tensors = load_file(source / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.1.{name}.weight"].zero_()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    step = {"do": "prune", "method": "layers", "ratio": 0.25}
    folder = compress(str(source), tmp_path / "out", recipe(text, step))
    assert folder.config["num_hidden_layers"] == 3
    before = ModelFolder.open(str(source))
    assert torch.allclose(logits(load_dense(before), before), logits(load_dense(folder), folder), atol=1e-3)
    assert torch.allclose(served_logits(source)[-1], served_logits(folder.path)[-1], atol=1e-3)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_kinds_of_layers_that_config_json_leaves_out(text: Path, tmp_path: Path, family: str) -> None:
    """transformers 4 wrote none; which layers have a window was told by their numbers."""
    source = folders.FAMILIES[family](tmp_path / "source", num_hidden_layers=4, layer_types=None)
    config = json.loads((source / "config.json").read_text())
    del config["layer_types"]
    (source / "config.json").write_text(json.dumps({**config, "sliding_window_pattern": 2}))
    whole = load_dense(ModelFolder.open(str(source)))
    kinds = whole.config.layer_types
    assert kinds == ["sliding_attention", "full_attention"] * 2
    folder = compress(str(source), tmp_path / "out", recipe(text, {"do": "prune", "method": "layers", "ratio": 0.25}))
    old, new = (
        [
            item.weights.view(name, (64, 64)).clone()
            for name in sorted(item.weights.names())
            if "self_attn.q_proj" in name
        ]
        for item in (ModelFolder.open(str(source)), folder)
    )
    kept = [next(index for index, values in enumerate(old) if torch.equal(values, mine)) for mine in new]
    assert folder.config["layer_types"] == [kinds[index] for index in kept]
    assert torch.allclose(served_logits(folder.path)[-1], logits(load_dense(folder), folder)[-1], atol=1e-3)


@pytest.mark.parametrize("family", ["DistilBert", "ModernBert"])
def test_encoders_with_fewer_layers(text: Path, tmp_path: Path, family: str) -> None:
    """The count goes by another name, and the first layer has no norm, so that no other can take its place."""
    options = {"n_layers": 4} if family == "DistilBert" else {}
    source = encoder(tmp_path / "source", family, "ForMaskedLM", **options)
    folder = compress(str(source), tmp_path / "out", recipe(text, {"do": "prune", "method": "layers", "ratio": 0.5}))
    assert folder.config.get("n_layers", folder.config.get("num_hidden_layers")) == 2
    loaded = load_encoder(folder, dtype="float32", kernels="reference").model
    batch = RaggedBatch.of([IDS], [[0] * len(IDS)], loaded.device)
    found = loaded.scores(loaded.forward(batch), batch)
    assert torch.allclose(found, logits(load_dense(folder), folder), atol=1e-3)
    if family == "ModernBert":
        with pytest.raises(ConfigError, match="layer 2 would take the place of layer 0"):
            step = {"do": "distill", "layers": [2, 3], "steps": 1}
            compress(str(source), tmp_path / "none", recipe(text, step))


def test_steps_in_a_row_go_on_where_they_stopped(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    steps = [
        {"do": "prune", "method": "channels", "ratio": 0.25},
        {"do": "prune", "method": "wanda", "ratio": 0.3},
        {"do": "quantize", "method": "gptq", "group_size": 32},
    ]
    wanted = recipe(text, *steps)
    whole = compress(str(models["llama"]), tmp_path / "whole", wanted)

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("quantize", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(str(models["llama"]), tmp_path / "again", wanted, interrupt)
    again = compress(str(models["llama"]), tmp_path / "again", wanted)
    assert all(mine.read_bytes() == other.read_bytes() for mine, other in zip(again.shards, whole.shards, strict=True))
    assert sorted(item.name for item in tmp_path.iterdir()) == ["again", "whole"]
    served_logits(again.path)


def test_what_another_run_left_is_no_result_of_this_one(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    steps = [{"do": "prune", "method": "magnitude", "ratio": 0.3}, {"do": "quantize", "bits": 8}]

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("quantize", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(str(models["llama"]), tmp_path / "out", recipe(text, *steps), interrupt)
    other = folders.llama(tmp_path / "other", hidden_size=64, intermediate_size=128, seed=1)
    for source, wanted in ((other, steps), (models["llama"], [{**steps[0], "ratio": 0.4}, steps[1]])):
        with pytest.raises(ConfigError, match=r"out\.step1 exists"):
            compress(str(source), tmp_path / "out", recipe(text, *wanted))
    compress(str(models["llama"]), tmp_path / "out", recipe(text, *steps))
    assert sorted(item.name for item in tmp_path.iterdir()) == ["other", "out"]


@pytest.mark.parametrize("family", ["bart", "mbart", "m2m100"])
def test_channels_of_either_side(text: Path, tmp_path: Path, family: str) -> None:
    source = encoder_decoder(tmp_path / "source", family, decoder_ffn_dim=64)
    folder = compress(str(source), tmp_path / "out", recipe(text, {"do": "prune", "method": "channels", "ratio": 0.25}))
    assert (folder.config["encoder_ffn_dim"], folder.config["decoder_ffn_dim"]) == (72, 48)
    served = decode_from_source(load_model(folder, dtype="float32", kernels="reference"), IDS, IDS)
    assert torch.allclose(served, logits(load_dense(folder), folder), atol=1e-3)


def test_groups_that_no_longer_divide_are_refused_before_work(
    models: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    steps = [{"do": "prune", "method": "channels", "ratio": 0.25}, {"do": "quantize", "group_size": 64}]
    with pytest.raises(ConfigError, match="leave 96 channels, which groups of 64"):
        compress(str(models["llama"]), tmp_path / "out", recipe(text, *steps))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"method": "layers", "ratio": 0.1}, "leaves out 0"),
        ({"method": "channels", "pattern": "2:4"}, "single weights"),
        ({"method": "wanda", "ratio": 1.0}, "ratio"),
        ({"method": "heads", "ratio": 0.01}, "leaves out none"),
    ],
)
def test_what_cannot_be_pruned(
    models: dict[str, Path], text: Path, tmp_path: Path, step: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compress(str(models["llama"]), tmp_path / "out", recipe(text, {"do": "prune", **step}))
    assert not list(tmp_path.iterdir())


def test_of_all_matrices_of_a_rank_the_one_with_the_nearest_outputs() -> None:
    x = inputs()
    moments, rank = x.t() @ x / len(x), 12
    left, right = low_rank.factor(WEIGHT, moments, rank)
    assert left.shape == (len(WEIGHT), rank) and right.shape == (rank, WEIGHT.shape[1])
    outputs = x @ WEIGHT.t()
    least = torch.linalg.svdvals(outputs.double())[rank:].square().sum()  # Eckart and Young
    assert float((x @ (left @ right).t() - outputs).square().sum()) == pytest.approx(float(least), rel=1e-3)
    u, s, v = torch.linalg.svd(WEIGHT, full_matrices=False)
    plain = (u[:, :rank] * s[:rank]) @ v[:rank]
    assert float((x @ plain.t() - outputs).square().sum()) > 1.1 * float(least)
    assert low_rank.rank_of((128, 64), 0.25) == 32


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_thin_factors_take_their_share(models: dict[str, Path], text: Path, tmp_path: Path, kind: str) -> None:
    step = {"do": "prune", "method": "rank", "ratio": 0.5}
    dense = compress(str(models[kind]), tmp_path / "dense", recipe(text, step))
    wanted = recipe(text, {**step, "store": "factors"})
    thin = compress(str(models[kind]), tmp_path / "thin", wanted)
    assert torch.equal(logits(load_dense(dense), dense), logits(load_dense(thin), thin))
    factored = [name.removesuffix(".left_factor") for name in thin.weights.names() if name.endswith(".left_factor")]
    assert len(factored) == {"llama": 6, "bert": 4, "t5": 12}[kind]
    sizes = [dense.weights.info(f"{name}.weight") for name in factored]
    whole = sum(info.end - info.start for info in sizes)
    assert dense.weight_bytes - thin.weight_bytes == pytest.approx(0.5 * whole, rel=0.05)

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("prune", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(str(models[kind]), tmp_path / "again", wanted, interrupt)
    again = compress(str(models[kind]), tmp_path / "again", wanted)
    assert [item.read_bytes() for item in again.shards] == [item.read_bytes() for item in thin.shards]
    with pytest.raises(ConfigError, match='method = "rank"'):
        recipe(text, {"do": "prune", "method": "wanda", "store": "factors"})
