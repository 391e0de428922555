"""Loading: choices and their report, tied embeddings, and errors that name the tensor or the setting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastserve.checkpoint.folder import ModelFolder
from fastserve.core.errors import CheckpointError, ConfigError
from fastserve.models.attention import VarlenContext
from fastserve.models.loader import LoadedModel, load_model, resolve_dtype
from tests import folders


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return folders.llama(tmp_path / "llama")


def load(path: Path, **options: Any) -> LoadedModel:
    return load_model(ModelFolder.open(str(path)), **options)


def change_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    (path / "config.json").write_text(json.dumps(config))


def change_tensors(path: Path, add: dict[str, torch.Tensor] | None = None, remove: str = "") -> None:
    tensors = load_file(path / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if name != remove} | (add or {})
    save_file(tensors, path / "model.safetensors")


def logits(loaded: LoadedModel) -> torch.Tensor:
    ids, positions = torch.arange(3, 23), torch.arange(20)
    context = VarlenContext(loaded.kernels, [0, 20], is_causal=True)
    return loaded.model.logits(loaded.model.forward(ids, positions, context))


def test_report_and_shape(llama: Path) -> None:
    loaded = load(llama)
    assert loaded.report[:2] == ["dtype: float32, device: cpu", "backend: native (LlamaForCausalLM)"]
    assert any(line.startswith("kernels:") for line in loaded.report)
    shape = loaded.model.shape
    tensors = load_file(llama / "model.safetensors")
    assert shape.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    assert shape.weight_bytes == 4 * shape.num_parameters
    assert (shape.num_layers, shape.num_kv_heads, shape.head_size, shape.max_positions) == (2, 2, 16, 512)
    assert not loaded.model.has_own_cache


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_precision(tmp_path: Path, dtype: str) -> None:
    folder = folders.llama(tmp_path, dtype=dtype)
    loaded = load(folder)
    assert loaded.model.shape.dtype is getattr(torch, dtype)
    narrow, wide = logits(loaded), logits(load(folder, dtype="float32"))
    assert narrow.dtype is wide.dtype is torch.float32
    assert 0 < (narrow - wide).abs().max() < 0.2


def test_dtype_of_the_folder(llama: Path) -> None:
    def resolved(name: str = "auto", **config: Any) -> torch.dtype:
        folder = ModelFolder.open(str(llama))
        folder.config = config
        return resolve_dtype(folder, name)

    assert resolved() is torch.float32
    assert resolved(dtype="bfloat16") is torch.bfloat16
    assert resolved(torch_dtype="float16") is torch.float16
    assert resolved("float32", dtype="bfloat16") is torch.float32
    with pytest.raises(ConfigError, match="asks for dtype 'float8"):
        resolved(dtype="float8_e4m3fn")


@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_parts_of_one_matrix_saved_in_other_types(tmp_path: Path, kernels: str) -> None:
    folder = folders.llama(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    names = [f"model.layers.0.{name}.weight" for name in ("self_attn.k_proj", "mlp.gate_proj")]
    narrow = {name: tensors[name].bfloat16() for name in names}
    change_tensors(folder, {name: values.float() for name, values in narrow.items()})
    expected = logits(load(folder, kernels=kernels))
    change_tensors(folder, narrow)
    assert torch.equal(logits(load(folder, kernels=kernels)), expected)


@pytest.mark.parametrize("has_head", [True, False])
def test_tied_embeddings(tmp_path: Path, has_head: bool) -> None:
    """With tied embeddings the embedding is the head, whether or not the files also hold one."""
    folder = folders.llama(tmp_path, tie_word_embeddings=True)
    expected = logits(load(folder))
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    if has_head:
        change_tensors(folder, {"lm_head.weight": torch.randn(folders.VOCAB_SIZE, 64)})
    loaded = load(folder)
    assert torch.equal(logits(loaded), expected)
    assert loaded.model.shape.num_parameters < load(folders.llama(tmp_path / "untied")).model.shape.num_parameters


def test_rope_buffers_of_old_folders_are_ignored(llama: Path) -> None:
    expected = logits(load(llama))
    change_tensors(llama, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert torch.equal(logits(load(llama)), expected)


def test_gpt2_as_it_was_published(tmp_path: Path) -> None:
    """Names without a prefix, and masks stored as tensors."""
    folder = folders.gpt2(tmp_path)
    expected = logits(load(folder))
    tensors = {
        name.removeprefix("transformer."): item for name, item in load_file(folder / "model.safetensors").items()
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 512, 512)
    tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, folder / "model.safetensors")
    assert torch.equal(logits(load(folder)), expected)


def test_missing_tensor(llama: Path) -> None:
    change_tensors(llama, remove="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"lacks tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        load(llama)


def test_unexpected_tensor(llama: Path) -> None:
    change_tensors(llama, {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_proj\.bias"):
        load(llama)


def test_wrong_shape(llama: Path) -> None:
    change_config(llama, intermediate_size=96)
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight.*\[128, 64\].*\[96, 64\]"):
        load(llama)


def test_unknown_architecture(llama: Path) -> None:
    change_config(llama, architectures=["UnheardOfForCausalLM"], model_type="unheard-of")
    with pytest.raises(CheckpointError, match="UnheardOfForCausalLM") as caught:
        load(llama)
    with pytest.raises(CheckpointError, match=r"Native architectures: LlamaForCausalLM.*backend=transformers"):
        load(llama, backend="native")
    assert "transformers" in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_no_cuda(llama: Path) -> None:
    with pytest.raises(ConfigError, match="use device=cpu"):
        load(llama, device="cuda")


def test_native_was_asked_for_and_cannot(llama: Path) -> None:
    change_config(llama, hidden_act="mish")
    with pytest.raises(CheckpointError, match=r"activation 'mish'.*backend=auto"):
        load(llama, backend="native")


def test_auto_goes_to_transformers_when_the_native_modules_cannot(llama: Path) -> None:
    expected = logits(load(llama))
    change_config(llama, hidden_act="mish")
    loaded = load(llama)
    assert loaded.report[1] == "backend: transformers (activation 'mish' is not known to the native modules)"
    assert not torch.allclose(logits(loaded), expected)
    change_config(llama, hidden_act="silu")
    torch.testing.assert_close(logits(load(llama, backend="transformers")), expected, atol=1e-4, rtol=0)
