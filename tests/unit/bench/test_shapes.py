"""The shape table against transformers, and the folders made from it."""

from __future__ import annotations

import json

import pytest

from fastserve.bench import quantized_model, random_model, shapes
from fastserve.checkpoint.folder import ModelFolder
from fastserve.core.errors import ConfigError

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("name", shapes.names())
def test_tensors_are_those_of_transformers(name: str) -> None:
    """Same names, same shapes, nothing missing and nothing surplus, on the meta device."""
    import torch
    import transformers

    wanted = shapes.shape(name)
    config = transformers.AutoConfig.for_model(**wanted.config)
    with torch.device("meta"):
        model = getattr(transformers, wanted.config["architectures"][0])(config)
    # Tied tensors are written once; what shares memory with a written tensor is no tensor of its own.
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items() if key not in tied}
    assert {tensor.name: tensor.shape for tensor in wanted.tensors} == expected


def test_unknown_shape_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"qwen3-0\.6b"):
        shapes.shape("gpt-7")


def test_folder_loads_in_transformers_and_is_seeded(tmp_path, monkeypatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(random_model, "MAX_SHARD_BYTES", 40_000)
    tiny = shapes.decoder_shape(TINY)
    first = random_model.write(tiny, tmp_path / "first")
    again = random_model.write(tiny, tmp_path / "again")
    other = random_model.write(tiny, tmp_path / "other", seed=1)

    index = json.loads((first / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    model, info = AutoModelForCausalLM.from_pretrained(first, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    weights = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (again, other)]
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(model.state_dict()[name], weights[0][name])
    assert not torch.equal(model.state_dict()[name], weights[1][name])
    assert abs(model.state_dict()[name].float().std().item() - random_model.STANDARD_DEVIATION) < 0.002

    tokenizer = AutoTokenizer.from_pretrained(first)
    text = "def main() -> None: print('größer 你好')"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_id == tiny.config["eos_token_id"]
    assert "assistant" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False, add_generation_prompt=True
    )


def test_write_refuses_a_folder_with_contents(tmp_path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        random_model.write(shapes.decoder_shape(TINY), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["note.txt"]


def test_interrupted_quantising_leaves_nothing_behind(tmp_path, monkeypatch) -> None:
    source = ModelFolder.open(str(random_model.write(shapes.decoder_shape(TINY), tmp_path / "source")))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quantized_model.shutil, "copyfile", interrupted)
        quantized_model.quantize_folder(source, tmp_path / "made", "int8")
    assert [file.name for file in tmp_path.iterdir()] == ["source"]
    made = ModelFolder.open(str(quantized_model.quantize_folder(source, tmp_path / "made", "int8")))
    assert "quantization_config" in made.config
    assert {file.name for file in source.path.iterdir()} - {"model.safetensors"} < {
        file.name for file in made.path.iterdir()
    }
