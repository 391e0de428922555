"""Adapter folders: what is read, and what is refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastserve.checkpoint.adapter import read_adapter
from fastserve.core.errors import CheckpointError

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = torch.ones(2, 8), torch.ones(6, 2)


def write(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config) -> Path:
    folder.mkdir()
    save_file(
        tensors or {f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B}, folder / "adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"alpha_pattern": {"q_proj": 1}}, 0.5),
        ({"alpha_pattern": {"k_proj": 1, "layers.0.self_attn.q_proj": 4}}, 2.0),
        ({"bias": "none", "use_dora": False, "modules_to_save": None}, 3.0),
    ],
)
def test_the_factor_is_in_b(tmp_path, config, factor):
    [(module, (a, b))] = read_adapter(write(tmp_path / "adapter", **config)).items()
    assert module == "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(a, A)
    torch.testing.assert_close(b, B * factor)


@pytest.mark.parametrize(
    ("tensors", "config", "reason"),
    [
        (None, {"peft_type": "IA3"}, "peft_type LORA"),
        (None, {"use_dora": True}, "use_dora"),
        (None, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        (None, {"bias": "all"}, "bias"),
        (None, {"lora_alpha": -1}, "lora_alpha"),
        (None, {"alpha_pattern": {"(a+)+$": 2}}, "alpha_pattern"),
        ({f"{MODULE}.lora_A.weight": A}, {}, "alone"),
        ({f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": torch.ones(6, 3)}, {}, "do not fit"),
        ({f"{MODULE}.lora_A.weight": A, f"{MODULE}.lora_B.weight": B * float("nan")}, {}, "finite"),
        ({f"{MODULE}.lora_A.weight": torch.ones(0, 8), f"{MODULE}.lora_B.weight": torch.ones(6, 0)}, {}, "do not fit"),
        ({f"{MODULE}.lora_embedding_A": A}, {}, "no LoRA matrix"),
    ],
)
def test_what_is_not_served(tmp_path, tensors, config, reason):
    with pytest.raises(CheckpointError, match=reason):
        read_adapter(write(tmp_path / "adapter", tensors, **config))


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(CheckpointError, match="no adapter folder"):
        read_adapter(tmp_path)
    for name in ("~nobody-of-this-name/x", "x" * 300, "~\0"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_adapter(name)


def test_what_peft_writes(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import AutoModelForCausalLM

    from tests import folders

    base = folders.llama(tmp_path / "base")
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    found = read_adapter(tmp_path / "adapter")
    assert len(found) == 14  # seven linears in each of two layers
    merged = model.merge_and_unload().state_dict()
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for module, (a, b) in found.items():
        torch.testing.assert_close(merged[f"{module}.weight"], plain[f"{module}.weight"] + b @ a)
