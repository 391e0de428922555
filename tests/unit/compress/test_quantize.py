"""Whole folders: what is written loads everywhere with the same logits, resumes to the same bytes, refuses early."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastserve.checkpoint.folder import ModelFolder
from fastserve.compress import smoothing
from fastserve.compress.activations import observe, siblings
from fastserve.compress.calibration import inputs_of
from fastserve.compress.mixed import Sensitivity, distribute
from fastserve.compress.network import Network, load_dense
from fastserve.compress.recipe import make_recipe, read_recipe
from fastserve.compress.run import compress
from fastserve.compress.walk import walk
from fastserve.core.errors import CheckpointError, ConfigError, FastServeError
from fastserve.models.loader import load_model
from tests import folders
from tests.encoder_decoder_folders import encoder_decoder
from tests.paged_driver import PagedDriver, decode_from_source

IDS = [5, 17, 99, 3, 250, 8, 8, 41]
STEPS: dict[str, dict[str, Any]] = {
    "rtn4": {"group_size": 32},
    "rtn4-asymmetric": {"group_size": 64, "symmetric": False},
    "rtn8": {"bits": 8},
    "rtn8-tensor": {"bits": 8, "group_size": -1},
    "rtn8-groups": {"bits": 8, "group_size": 32},
    "rtn6": {"bits": 6, "group_size": 0},
    "rtn3": {"bits": 3, "group_size": 32},
    "rtn2-asymmetric": {"bits": 2, "group_size": 32, "symmetric": False},
    "rtn4-head": {"group_size": 32, "head": "int8"},
    "gptq": {"method": "gptq", "group_size": 32},
    "awq": {"method": "awq", "group_size": 32},
    "kmeans4": {"method": "kmeans"},
    "kmeans3": {"method": "kmeans", "bits": 3},
    "float8": {"kind": "float", "bits": 8},
    "w8a8": {"bits": 8, "activations": "dynamic"},
    "w8a8-tensor-asymmetric": {"bits": 8, "group_size": -1, "symmetric": False, "activations": "dynamic"},
    "smoothquant": {"method": "smoothquant", "bits": 8, "activations": "static", "observer": "percentile"},
}


def recipe(text: Path | None, **step: Any) -> Any:
    values: dict[str, Any] = {"steps": [{"do": "quantize", **step}]}
    values["calibration"] = {"text": str(text or ""), "samples": 6, "length": 48, "batch_size": 4}
    return make_recipe(values)


def served_logits(folder: Path) -> Tensor:
    driver = PagedDriver(load_model(ModelFolder.open(str(folder)), dtype="float32", kernels="reference"))
    driver.add("a", IDS)
    return driver.step({"a": len(IDS)})["a"]


def logits(model: Any, folder: ModelFolder) -> Tensor:
    with torch.no_grad():
        return model(**inputs_of(folder, torch.tensor([IDS]))).logits[0]


@pytest.mark.parametrize("name", ["rtn4-head", "rtn8-head"])
def test_a_tied_embedding_takes_the_place_of_the_head(tmp_path: Path, name: str) -> None:
    source = folders.llama(tmp_path / "tied", tie_word_embeddings=True)
    step = {"bits": 8, "head": "int8"} if name == "rtn8-head" else STEPS[name]
    folder = compress(str(source), tmp_path / "out", recipe(None, **step))
    dense = logits(load_dense(folder), folder)
    found = served_logits(folder.path)
    assert (found - dense[-len(found) :]).abs().max() < 2e-3 * dense.abs().max()


@pytest.mark.parametrize("kind", ["bert", "t5"])
@pytest.mark.parametrize("name", STEPS)
def test_other_networks_stay_near_the_original(
    models: dict[str, Path], text: Path, tmp_path: Path, name: str, kind: str
) -> None:
    source = ModelFolder.open(str(models[kind]))
    folder = compress(str(models[kind]), tmp_path / "out", recipe(text, **STEPS[name]))
    near = torch.nn.functional.cosine_similarity(logits(load_dense(folder), folder), logits(load_dense(source), source))
    assert near.min() > {2: 0.3, 3: 0.7, 4: 0.75}.get(STEPS[name].get("bits", 4), 0.99)


def test_smoothing_changes_nothing_but_rounding(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """With 8 bits per row, what is left after scaling norms and columns is the original."""
    for kind in ("llama", "t5"):
        source = ModelFolder.open(str(models[kind]))
        step = {"method": "smoothquant", "bits": 8, "activations": "dynamic", "smoothing": 0.8}
        folder = compress(str(models[kind]), tmp_path / kind, recipe(text, **step))
        before, after = logits(load_dense(source), source), logits(load_dense(folder), folder)
        assert torch.nn.functional.cosine_similarity(before, after).min() > 0.998
        norms = [
            name
            for name in source.weights.names()
            if name.endswith(("input_layernorm.weight", "layer.0.layer_norm.weight"))
        ]
        old, new = (item.weights.view(norms[0], item.weights.shape(norms[0])).clone() for item in (source, folder))
        assert not torch.allclose(old, new)


FOLDS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("llama", {}, ("input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj")),
    ("gemma2", {}, ("input_layernorm", "pre_feedforward_layernorm", "self_attn.v_proj", "mlp.up_proj")),
    ("olmo2", {}, ("self_attn.v_proj", "mlp.up_proj")),  # norms after the branches
    ("nemotron", {}, ("self_attn.v_proj",)),  # norms stored less one, an activation between up and down
    ("opt", {}, ("self_attn_layer_norm", "final_layer_norm", "self_attn.v_proj")),
    ("opt", {"do_layer_norm_before": False}, ("self_attn.v_proj",)),
    ("bart", {}, ("self_attn.v_proj",)),
]


@pytest.mark.parametrize(("family", "options", "sources"), FOLDS)
def test_folds_leave_a_block_s_function_alone(
    tmp_path: Path, family: str, options: dict[str, Any], sources: tuple[str, ...]
) -> None:
    if family == "bart":
        folder = ModelFolder.open(str(encoder_decoder(tmp_path / "model", "bart")))
    elif family == "nemotron":
        folder = ModelFolder.open(str(folders.other(tmp_path / "model", "NemotronConfig")))
    else:
        folder = ModelFolder.open(str(folders.FAMILIES[family](tmp_path / "model", **options)))
    network = Network(folder)
    for visit in walk(network, [inputs_of(folder, torch.tensor([IDS]))]):
        linears = network.linears(visit.block)
        statistics = observe(visit, linears)
        [before] = visit.outputs()
        folds = smoothing.find_folds(visit, linears, siblings(statistics))
        names = {id(module): name for name, module in visit.module.named_modules()}
        assert {names[id(fold.source)] for fold in folds} == set(sources)
        for fold in folds:
            reader = next(iter(fold.linears.values()))
            smoothing.apply(fold, torch.rand(reader.in_features) + 0.5, statistics, torch.float32)
        [after] = visit.outputs()
        assert (first(after) - first(before)).abs().max() < 1e-4 * first(before).abs().max()


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_a_walk_sees_what_a_forward_sees(models: dict[str, Path], kind: str) -> None:
    folder = ModelFolder.open(str(models[kind]))
    batches = [
        inputs_of(folder, torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(seed)))
        for seed in (0, 1)
    ]
    expected: dict[str, list[Tensor]] = {}
    whole = load_dense(folder)
    network = Network(folder)
    for name in network.blocks:
        whole.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: expected.setdefault(name, []).append(first(output))
        )
    with torch.no_grad():
        for batch in batches:
            whole(**batch)
    seen = {}
    for visit in walk(network, batches):
        seen[visit.block] = [first(output) for output in visit.outputs()]
        filled = [name for name in network.blocks if not next(network.block(name).parameters()).is_meta]
        assert filled == [visit.block]  # one block in memory
        words = network.model.get_input_embeddings()
        assert words.weight.untyped_storage().nbytes() <= 4  # and no table of all tokens
    assert list(seen) == network.blocks
    for name, outputs in seen.items():
        for mine, other in zip(outputs, expected[name], strict=True):
            assert torch.allclose(mine, other, atol=1e-4)
    assert all(values.is_meta for values in network.model.parameters())
    for name in ("", *network.blocks):
        network.fill(name)
    with torch.no_grad():
        torch.testing.assert_close(network.model(**batches[0]).logits, whole(**batches[0]).logits)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_an_interrupted_run_ends_with_the_same_bytes(
    models: dict[str, Path], text: Path, tmp_path: Path, method: str
) -> None:
    wanted = recipe(text, method=method, group_size=32)
    whole = compress(str(models["llama"]), tmp_path / "whole", wanted)

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("quantize", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(str(models["llama"]), tmp_path / "again", wanted, interrupt)
    assert not (tmp_path / "again").exists()
    with pytest.raises(ConfigError, match="begun with another recipe"):
        compress(str(models["llama"]), tmp_path / "again", recipe(text, method=method, group_size=64))
    again = compress(str(models["llama"]), tmp_path / "again", wanted)
    assert [file.name for file in again.shards] == [file.name for file in whole.shards]
    assert all(mine.read_bytes() == other.read_bytes() for mine, other in zip(again.shards, whole.shards, strict=True))
    errors = [json.loads((item.path / "fastserve.json").read_text())["compressed"]["steps"] for item in (whole, again)]
    assert errors[0] == errors[1] and len(errors[0][0]["layer_errors"]) == 14
    assert not [item for item in tmp_path.iterdir() if item.name not in ("whole", "again")]


def test_methods_are_as_good_as_their_names(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """Mean error of the layers' outputs on the same inputs."""
    found = {}
    for method in ("rtn", "awq", "gptq"):
        folder = compress(
            str(models["llama"]), tmp_path / method, recipe(text, method=method, bits=3, group_size=64, search=False)
        )
        card = json.loads((folder.path / "fastserve.json").read_text())
        errors = card["compressed"]["steps"][0]["layer_errors"]
        found[method] = sum(errors.values()) / len(errors)
    assert found["gptq"] < 0.8 * found["rtn"] and found["awq"] < found["rtn"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "gptq"}, "calibration.text"),
    ({"group_size": 48}, r"model\.layers\.0\.self_attn\.q_proj has 64 inputs"),
    ({"group_size": 32, "ignore": ["re:.*"]}, "every linear"),
    ({"bits": 12}, r"steps\[0\]\.bits"),
    ({"bitz": 4}, "bitz"),
    ({"method": "kmeans", "kind": "float"}, "kmeans"),
    ({"method": "kmeans", "bits": 5}, "codebook weights of 5"),
    ({"method": "kmeans", "activations": "dynamic"}, "16-bit activations"),
    ({"method": "smoothquant"}, "8-bit activations"),
    ({"bits": 4, "budget": 3.5}, "budget = 3.5"),
]


@pytest.mark.parametrize(("step", "message"), REFUSED)
def test_a_bad_recipe_is_refused_before_work(
    models: dict[str, Path], tmp_path: Path, step: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compress(str(models["llama"]), tmp_path / "out", recipe(None, **step))
    assert list(tmp_path.iterdir()) == []


def test_recipes_from_files(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('[calibration]\ntext = "a.txt"\n[[steps]]\ndo = "quantize"\nmethod = "gptq"\n')
    assert read_recipe(file).steps[0].method == "gptq"  # type: ignore[union-attr]
    for content, message in (
        ("[[steps]", "not valid TOML"),
        ('[[steps]]\ndo = "squeeze"', "squeeze"),
        ("steps = []", "steps"),
    ):
        file.write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_recipe(file)
    with pytest.raises(ConfigError, match="cannot read"):
        read_recipe(tmp_path / "none.toml")


def test_bad_folders_are_refused_before_work(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    from tests import folders

    step = recipe(None, group_size=32)
    damaged = tmp_path / "damaged"
    shutil.copytree(models["llama"], damaged)
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    cases: list[tuple[Path, Any, str]] = [
        (damaged, step, r"model\.layers\.1\.mlp\.up_proj\.weight holds values that are not finite"),
        (folders.gpt2(tmp_path / "gpt2"), step, r"transformer\.h\.0\.attn\.c_attn \(Conv1D\)"),
        (folders.FAMILIES["mixtral"](tmp_path / "mixtral"), step, "experts"),
        (compress(str(models["llama"]), tmp_path / "done", step).path, step, "quantised already"),
        (models["llama"], recipe(tmp_path / "none.txt", method="gptq"), "is no file"),
    ]
    for source, wanted, message in cases:
        with pytest.raises(FastServeError, match=message):
            compress(str(source), tmp_path / "new", wanted)
        assert not list(tmp_path.glob("new*"))
    with pytest.raises(ConfigError, match="not empty"):
        compress(str(models["llama"]), tmp_path / "done", step)
    short = tmp_path / "short.txt"
    short.write_text("the fox")
    with pytest.raises(ConfigError, match="fewer than one window"):
        compress(str(models["llama"]), tmp_path / "new", recipe(short, method="gptq", group_size=32))


@pytest.mark.parametrize("family", ["marian", "pegasus"])
def test_positions_that_are_computed_and_a_bias_of_the_logits(tmp_path: Path, family: str) -> None:
    """Folders of Marian have no positions, and older ones of Pegasus neither; the bias is a buffer."""
    from transformers import AutoModelForSeq2SeqLM

    source = ModelFolder.open(str(encoder_decoder(tmp_path / "source", family)))
    tensors = {name: values for name, values in load_file(source.shards[0]).items() if "embed_positions" not in name}
    assert bool(tensors["final_logits_bias"].any())
    save_file(tensors, source.shards[0], metadata={"format": "pt"})
    source = ModelFolder.open(str(source.path))
    theirs = AutoModelForSeq2SeqLM.from_pretrained(source.path).eval()
    assert torch.allclose(logits(load_dense(source), source), logits(theirs, source), atol=1e-4)
    folder = compress(str(source.path), tmp_path / "out", recipe(None, bits=8))
    assert not [name for name in folder.weights.names() if "embed_positions" in name]
    served = decode_from_source(load_model(folder, dtype="float32", kernels="reference"), IDS, IDS)
    assert torch.allclose(served, logits(load_dense(folder), folder), atol=1e-3)


def test_an_unknown_architecture(models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(models["llama"], tmp_path / "odd")
    config = json.loads((tmp_path / "odd/config.json").read_text())
    (tmp_path / "odd/config.json").write_text(json.dumps({**config, "architectures": ["OddForCausalLM"]}))
    with pytest.raises(CheckpointError, match="OddForCausalLM"):
        compress(str(tmp_path / "odd"), tmp_path / "out", recipe(None, group_size=32))


def test_bits_go_where_they_help() -> None:
    small = Sensitivity(("a",), 100, {4: 0.1, 8: 0.0}, {4: 4.0, 8: 8.0})
    large = Sensitivity(("b", "c"), 100, {4: 0.9, 8: 0.1}, {4: 4.0, 8: 8.0})
    assert distribute([small, large], 6.0) == {"a": 4, "b": 8, "c": 8}
    assert distribute([small, large], 8.0) == {"a": 8, "b": 8, "c": 8}
    assert distribute([small, large], 5.0) == {"a": 4, "b": 4, "c": 4}
    with pytest.raises(ConfigError, match=r"take 4\.000 per weight"):
        distribute([small, large], 3.9)


def test_mixed_precision_keeps_its_budget(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    wanted = recipe(text, bits=3, group_size=32, budget=5.0)

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("quantize", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(str(models["llama"]), tmp_path / "out", wanted, interrupt)
    folder = compress(str(models["llama"]), tmp_path / "out", wanted)
    assert not list(folder.path.glob("kept*"))
    groups = folder.config["quantization_config"]["config_groups"].values()
    assert len(groups) > 1
    layers = [
        name for name in folder.weights.names() if ".layers." in name and "weight_" in name and "shape" not in name
    ]
    info = [folder.weights.info(name) for name in layers]
    num_weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
    scales = sum((item.end - item.start) for name, item in zip(layers, info, strict=True) if name.endswith("scale"))
    bits = 8 * (sum(item.end - item.start for item in info) - scales / 2) / num_weights  # scales count as 16 bits
    assert 4.0 < bits <= 5.0
    dense = logits(load_dense(folder), folder)
    assert (served_logits(folder.path)[-1] - dense[-1]).abs().max() < 2e-3 * dense.abs().max()
