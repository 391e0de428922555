"""GGUF files that we write: read back, they are the model that they were made of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fastserve.checkpoint.folder import ModelFolder
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.cli.main import app
from fastserve.compress.gguf_export import TYPES, export
from fastserve.compress.network import load_dense
from fastserve.compress.recipe import make_recipe
from fastserve.compress.run import compress
from fastserve.core.errors import ConfigError
from tests import folders
from tests.unit.compress.test_quantize import logits, served_logits

TEXT = "naïve — 你好 🦊\n\t Once upon 1234 times, don't!"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def closeness(folder: Path | str, file: Path) -> float:
    before, after = served_logits(Path(folder)), served_logits(ModelFolder.open(str(file)).path)
    return float((before - after).abs().max() / before.abs().max())


@pytest.mark.parametrize("name", ["llama", "llama3", "mistral", "qwen2", "qwen3"])
def test_a_float_file_is_the_model(tmp_path: Path, name: str) -> None:
    folder = folders.FAMILIES[name](tmp_path / "folder")
    file = export(ModelFolder.open(str(folder)), tmp_path / "model.gguf", "f32")
    assert closeness(folder, file) < 1e-5
    mine, theirs = Tokenizer.load(ModelFolder.open(str(file))), Tokenizer.load(ModelFolder.open(str(folder)))
    assert mine.encode(TEXT) == theirs.encode(TEXT) and mine.special_ids == theirs.special_ids


def test_the_builtin_model_keeps_its_tokenizer_and_template(tmp_path: Path) -> None:
    file = export(ModelFolder.open(""), tmp_path / "model.gguf", "bf16")
    opened = ModelFolder.open(str(file))
    mine, theirs = Tokenizer.load(opened), Tokenizer.load(ModelFolder.open(""))
    messages = [{"role": "user", "content": "hi"}]
    assert mine.encode(TEXT) == theirs.encode(TEXT) and mine.render_chat(messages) == theirs.render_chat(messages)
    assert opened.eos_token_ids == ModelFolder.open("").eos_token_ids[:1]
    assert closeness(ModelFolder.open("").path, file) < 1e-5


@pytest.mark.parametrize(
    ("kind", "limit"), [("f16", 1e-3), ("bf16", 4e-3), ("q8_0", 0.01), ("q5_1", 0.06), ("q4_0", 0.15)]
)
def test_types_lose_what_their_bits_say(models: dict[str, Path], tmp_path: Path, kind: str, limit: float) -> None:
    source = ModelFolder.open(str(models["llama"]))
    file = export(source, tmp_path / "model.gguf", kind)
    after, before = load_dense(ModelFolder.open(str(file))), load_dense(source)
    for name, values in before.named_parameters():
        assert (after.get_parameter(name) - values).norm() < limit * values.norm(), name
    found = {item.name: item.tensor_type.name for item in GGUFReader(file).tensors}
    assert found["blk.0.ffn_down.weight"] == kind.upper() and found["blk.0.attn_norm.weight"] == "F32"
    assert found["token_embd.weight"] == ("Q8_0" if kind.startswith("q") else kind.upper())


def test_what_gptq_chose_is_what_the_file_has(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    step = {"do": "quantize", "method": "gptq", "bits": 4, "group_size": 32}
    calibration = {"text": str(text), "samples": 4, "length": 32}
    folder = compress(
        str(models["llama"]), tmp_path / "out", make_recipe({"steps": [step], "calibration": calibration})
    )
    file = export(folder, tmp_path / "model.gguf", "q4_0")
    found, wanted = (load_dense(item) for item in (ModelFolder.open(str(file)), folder))
    for name, values in wanted.named_parameters():
        if "_proj" in name:
            assert torch.allclose(found.get_parameter(name), values, rtol=1e-3, atol=1e-6), name
    assert "Q4_0" in {item.tensor_type.name for item in GGUFReader(file).tensors}


@pytest.mark.parametrize(
    "step",
    [
        {"do": "quantize", "bits": 8},
        {"do": "quantize", "method": "kmeans"},
        {"do": "prune", "method": "rank", "store": "factors"},
    ],
    ids=["int8", "codebook", "factors"],
)
def test_compressed_folders_are_written_as_what_they_stand_for(
    models: dict[str, Path], text: Path, tmp_path: Path, step: dict[str, Any]
) -> None:
    calibration = {"text": str(text), "samples": 4, "length": 32}
    folder = compress(
        str(models["llama"]), tmp_path / "out", make_recipe({"steps": [step], "calibration": calibration})
    )
    file = export(folder, tmp_path / "model.gguf", "f32")
    assert torch.allclose(
        logits(load_dense(ModelFolder.open(str(file))), folder), logits(load_dense(folder), folder), atol=1e-4
    )


def test_the_command(models: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    arguments = ["compress", str(models["llama"]), "--gguf", "q8_0", "--out", str(file), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["bytes"] == file.stat().st_size
    assert sorted(item.name for item in tmp_path.iterdir()) == ["model.gguf"]


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [("q4_k", "llama", "no GGUF type"), ("q8_0", "bert", "BertForMaskedLM is not written")],
)
def test_what_is_not_written(models: dict[str, Path], tmp_path: Path, kind: str, model: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export(ModelFolder.open(str(models[model])), tmp_path / "model.gguf", kind)
    assert not list(tmp_path.iterdir()) and "q4_k" not in TYPES


def test_a_tensor_without_a_form_in_gguf_is_not_left_out(models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(models["llama"], tmp_path / "odd")
    file = tmp_path / "odd" / "model.safetensors"
    save_file({**load_file(file), "model.layers.0.self_attn.sinks": torch.zeros(4)}, file)
    with pytest.raises(ConfigError, match=r"a tensor model\.layers\.0\.self_attn\.sinks, for which GGUF"):
        export(ModelFolder.open(str(tmp_path / "odd")), tmp_path / "model.gguf", "f16")
    assert [item.name for item in tmp_path.iterdir()] == ["odd"]


def test_a_file_is_not_written_over(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        export(ModelFolder.open(str(models["llama"])), tmp_path / "model.gguf", "f16")
    assert (tmp_path / "model.gguf").read_text() == "mine"
