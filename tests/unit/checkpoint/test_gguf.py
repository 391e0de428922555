"""GGUF files: the same model as the folder that they were made of, exactly where the file is exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf")

from gguf import GGMLQuantizationType as Type
from gguf import dequantize

from fastserve import LLM, SamplingParams
from fastserve.checkpoint.folder import ModelFolder
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.core.errors import CheckpointError
from tests import folders
from tests.gguf_files import write_gguf

PROMPT = "Once upon a time there was a fox"
SETTINGS = {"dtype": "float32", "kernels": "reference", "kv_cache_memory": 8 << 20, "max_model_len": 256}
PLAIN = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastserve" / "gguf"


def answer(folder: Path | str) -> tuple[list[int], np.ndarray]:
    """32 greedy tokens and their log probabilities."""
    llm = LLM(str(folder), **SETTINGS)
    [output] = llm.generate([PROMPT], SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, logprobs=1))
    choice = output.outputs[0]
    return choice.token_ids, np.array(
        [item[token].logprob for item, token in zip(choice.logprobs, choice.token_ids, strict=True)]
    )


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_file_is_the_model_it_was_made_of(tmp_path: Path, name: str) -> None:
    options = {"num_hidden_layers": 6} if name == "gemma3" else {}
    if name == "gemma3":
        options["layer_types"] = ["sliding_attention"] * 5 + ["full_attention"]
    folder = folders.FAMILIES[name](tmp_path / "folder", **options)
    file = write_gguf(folder, tmp_path / "model.gguf", name)
    (tokens, logprobs), (expected, wanted) = answer(file), answer(folder)
    assert tokens == expected
    np.testing.assert_allclose(logprobs, wanted, atol=1e-4)


def test_tokenizer_template_and_ends_come_along(tmp_path: Path) -> None:
    folder = folders.llama(tmp_path / "folder")
    write_gguf(
        folder, tmp_path / "one" / "model.gguf" if (tmp_path / "one").mkdir() else tmp_path / "one/model.gguf", "llama"
    )
    opened, original = ModelFolder.open(str(tmp_path / "one")), ModelFolder.open(str(folder))
    assert opened.name == "model"
    assert opened.eos_token_ids == (folders.IM_END,)
    mine, theirs = Tokenizer.load(opened), Tokenizer.load(original)
    for text in (PROMPT, "naïve — 你好 🦊\n\t x", "<|im_start|>user\nhi<|im_end|>"):
        assert mine.encode(text) == theirs.encode(text)
        assert mine.decode(mine.encode(text)) == theirs.decode(theirs.encode(text))
    messages = [{"role": "user", "content": "hi"}]
    assert mine.render_chat(messages) == theirs.render_chat(messages)
    assert mine.special_ids == theirs.special_ids


def test_frequency_factors_are_those_of_llama3(tmp_path: Path) -> None:
    from fastserve.models.rope import read_rope

    folder = folders.llama3(tmp_path / "folder")
    config = ModelFolder.open(str(folder)).config
    stretched, _ = read_rope(config, 16).frequencies()
    usual, _ = read_rope({"rope_theta": 10000.0}, 16).frequencies()
    file = write_gguf(folder, tmp_path / "model.gguf", "llama", frequency_factors=(usual / stretched).tolist())
    assert answer(file)[0] == answer(folder)[0]


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1])
def test_blocks_have_the_values_that_the_package_finds(tmp_path: Path, kind: Type) -> None:
    folder = folders.llama(tmp_path / "folder")
    expected: dict[str, np.ndarray] = {}

    def choose(name: str, values: np.ndarray) -> Type | None:
        if values.ndim < 2 or name == "token_embd.weight":
            return None
        from gguf import quantize

        expected[name] = dequantize(quantize(values.astype(np.float32), kind), kind)
        return kind

    file = write_gguf(folder, tmp_path / "model.gguf", "llama", choose)
    opened = ModelFolder.open(str(file))
    assert bool(opened.config.get("quantization_config")) == (kind is Type.Q4_0)
    found = values_of(opened, "blk.1.ffn_down.weight")
    np.testing.assert_allclose(found, expected["blk.1.ffn_down.weight"], rtol=5e-4)
    rows = expected["blk.0.attn_q.weight"].reshape(4, -1, 2, 64).swapaxes(1, 2).reshape(64, 64)
    np.testing.assert_allclose(values_of(opened, "blk.0.attn_q.weight"), rows, rtol=5e-4)
    np.testing.assert_allclose(values_of(opened, "output.weight"), expected["output.weight"], rtol=5e-4)


def values_of(folder: ModelFolder, name: str) -> np.ndarray:
    """A matrix of a converted folder, as the loader reads it."""
    from fastserve.checkpoint.gguf_config import hugging_face_name
    from fastserve.checkpoint.quantization import read_quantization
    from fastserve.checkpoint.quantized import read_quantized

    wanted = hugging_face_name("llama", name)
    if wanted in folder.weights:
        return folder.weights.view(wanted, folder.weights.shape(wanted)).float().numpy()
    module = wanted.removesuffix(".weight")
    num_rows, num_words = folder.weights.shape(f"{module}.weight_packed")
    [layout] = read_quantization(folder.config).formats
    return read_quantized(folder.weights, module, (num_rows, num_words * 8), layout).dequantize().numpy()


def test_k_quants_are_read(tmp_path: Path) -> None:
    """Blocks of random bytes with moderate scales, as there is no Python code that makes them of numbers."""
    folder = folders.llama(tmp_path / "folder", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    generator = np.random.default_rng(0)
    sizes = {Type.Q4_K: (144, (0, 2)), Type.Q6_K: (210, (208,)), Type.Q5_K: (176, (0, 2)), Type.Q2_K: (84, (80, 82))}
    kinds = {"attn_q": Type.Q4_K, "attn_k": Type.Q4_K, "attn_v": Type.Q6_K, "ffn_down": Type.Q5_K, "ffn_up": Type.Q2_K}
    expected: dict[str, np.ndarray] = {}

    def choose(name: str, values: np.ndarray) -> tuple[np.ndarray, Type] | None:
        kind = kinds.get(name.split(".")[-2])
        if kind is None:
            return None
        size, places = sizes[kind]
        data = generator.integers(0, 256, (len(values), size), dtype=np.uint8)
        for place in places:  # scales in float16
            data[:, place : place + 2] = np.frombuffer(np.float16(1e-3).tobytes(), np.uint8)
        expected[name] = dequantize(data, kind)
        return data, kind

    file = write_gguf(folder, tmp_path / "model.gguf", "llama", choose)
    opened = ModelFolder.open(str(file))
    for role in ("attn_v", "ffn_down", "ffn_up"):
        name = f"blk.0.{role}.weight"
        np.testing.assert_allclose(values_of(opened, name), expected[name], rtol=1e-3, atol=1e-6)
    assert len(answer(file)[0]) == 32


def test_a_q4_0_model_is_served_packed(tmp_path: Path) -> None:
    """Packed and dequantised are the same answer; matrices that are merged are packed together or not at all."""
    folder = folders.llama(tmp_path / "folder")
    layers = lambda name, values: Type.Q4_0 if name.startswith("blk.") and values.ndim == 2 else None  # noqa: E731
    mixed = lambda name, values: Type.Q8_0 if name == "blk.0.attn_v.weight" else layers(name, values)  # noqa: E731
    packed = write_gguf(folder, tmp_path / "packed.gguf", "llama", layers)
    tokens, _ = answer(packed)
    names = ModelFolder.open(str(packed)).weights.names()
    assert "model.layers.0.self_attn.q_proj.weight_packed" in names
    dense = tmp_path / "dense"
    write_dense_copy(ModelFolder.open(str(packed)), dense)
    assert tokens == answer(dense)[0]
    other = ModelFolder.open(str(write_gguf(folder, tmp_path / "mixed.gguf", "llama", mixed)))
    assert "model.layers.0.self_attn.q_proj.weight" in other.weights
    assert "model.layers.1.self_attn.q_proj.weight_packed" in other.weights
    assert len(answer(tmp_path / "mixed.gguf")[0]) == 32


def write_dense_copy(folder: ModelFolder, target: Path) -> None:
    """The same folder with every matrix in float32."""
    import json
    import shutil

    import torch
    from safetensors.torch import save_file

    from fastserve.checkpoint.quantization import read_quantization
    from fastserve.checkpoint.quantized import read_quantized

    [layout] = read_quantization(folder.config).formats
    tensors = {}
    for name in folder.weights.names():
        module, _, suffix = name.rpartition(".")
        if suffix == "weight_packed":
            rows, words = folder.weights.shape(name)
            weight = read_quantized(folder.weights, module, (rows, words * 8), layout)
            tensors[f"{module}.weight"] = weight.dequantize()
        elif suffix in ("weight", "bias"):
            tensors[name] = folder.weights.view(name, folder.weights.shape(name)).to(torch.float32).clone()
    shutil.copytree(folder.path, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, target / "model.safetensors")
    config = {name: value for name, value in folder.config.items() if name != "quantization_config"}
    (target / "config.json").write_text(json.dumps(config))


def test_it_is_converted_once_and_leaves_nothing_when_it_fails(tmp_path: Path, own_cache: Path) -> None:
    folder = folders.llama(tmp_path / "folder", num_hidden_layers=1)
    file = write_gguf(folder, tmp_path / "model.gguf", "llama")
    first = ModelFolder.open(str(file)).path
    stamp = (first / "config.json").stat().st_mtime_ns
    assert ModelFolder.open(str(file)).path == first
    assert (first / "config.json").stat().st_mtime_ns == stamp
    for name, word, options in (
        ("odd", "known: llama", {"architecture": "rwkv"}),
        ("first-gemma", "'gemma' are not read", {"architecture": "gemma"}),
        ("lacking", "block_count", {"architecture": "llama", "leave_out": ("block_count",)}),
        ("empty", "token_embd", {"architecture": "llama", "leave_out": ("token_embd.weight",)}),
    ):
        broken = write_gguf(folder, tmp_path / f"{name}.gguf", **options)
        with pytest.raises(CheckpointError, match=word):
            ModelFolder.open(str(broken))
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:5000])
    (tmp_path / "none.gguf").write_bytes(b"GGUF")
    for name in ("cut", "none"):
        with pytest.raises(CheckpointError, match="damaged"):
            ModelFolder.open(str(tmp_path / f"{name}.gguf"))
    with pytest.raises(CheckpointError, match="several"):
        ModelFolder.open(str(tmp_path))
    assert list(own_cache.iterdir()) == [first]


def test_parts_must_all_be_there(tmp_path: Path) -> None:
    folder = folders.llama(tmp_path / "folder", num_hidden_layers=1)
    write_gguf(folder, tmp_path / "model-00001-of-00002.gguf", "llama")
    with pytest.raises(CheckpointError, match="lacks model-00002"):
        ModelFolder.open(str(tmp_path))
