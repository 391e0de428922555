"""Quantised folders: each layout gives the weights that its definition says, and what cannot be served is refused.

The packers here are written from the formats' definitions, value by value, and share nothing with the readers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastserve.bench.quantized_model import quantize_folder
from fastserve.checkpoint.folder import ModelFolder
from fastserve.checkpoint.quantization import read_quantization
from fastserve.checkpoint.quantized import QuantizedWeight, read_quantized
from fastserve.checkpoint.weights import WeightReader
from fastserve.core.errors import CheckpointError, ConfigError
from fastserve.models.loader import LoadedModel, load_model
from tests import folders
from tests.encoder_decoder_folders import encoder_decoder
from tests.kernels.conftest import load_native
from tests.paged_driver import PagedDriver, decode_from_source

SCHEMES = [
    "int8", "int8-asym", "int8-a8", "int4-g32", "int4-g32-asym", "int4-g64-a8", "int4", "int4-asym", "codebook",
]  # fmt: skip
GENERATOR = torch.Generator().manual_seed(0)


def draw(top: int, *shape: int) -> Tensor:
    return torch.randint(0, top, shape, generator=GENERATOR)


def packed(values: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """[R, C] below 16 -> int32 [R, C / 8]: place i of a word holds column order[i]."""
    words = torch.zeros(values.shape[0], values.shape[1] // 8, dtype=torch.int64)
    for row in range(words.shape[0]):
        for word in range(words.shape[1]):
            for place, column in enumerate(order):
                words[row, word] |= int(values[row, 8 * word + column]) << (4 * place)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def read(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    file = folder / "model.safetensors"
    save_file({f"m.{name}": tensor.contiguous() for name, tensor in tensors.items()}, file)
    quantization = read_quantization({"quantization_config": config})
    assert quantization is not None
    layout = quantization.format_of("m")
    assert layout is not None
    return as_floats(read_quantized(WeightReader([file]), "m", shape, layout))


def as_floats(weight: QuantizedWeight | Tensor) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.dequantize()


def compressed(bits: int, symmetric: bool, layout: str, group: int = 0, **options: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group" if group else "channel"}
    weights |= {"group_size": group or None, "actorder": None, **options.pop("weights", {})}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, **options}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "ignore": ["lm_head"]}


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_gptq(tmp_path: Path, is_symmetric: bool) -> None:
    values, scales = draw(16, 24, 64), torch.rand(24, 2, generator=GENERATOR).half()  # [N, K], [N, G]
    zeros = torch.full((24, 2), 8) if is_symmetric else 1 + draw(15, 24, 2)
    tensors = {
        "qweight": packed(values).t(),
        "qzeros": packed((zeros - 1).t()),
        "scales": scales.t(),
        "g_idx": torch.arange(64, dtype=torch.int32) // 32,
    }
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": is_symmetric, "desc_act": False}
    expected = (values - zeros.repeat_interleave(32, dim=1)) * scales.float().repeat_interleave(32, dim=1)
    assert torch.equal(read(tmp_path, config, tensors, (24, 64)), expected)
    second = {**config, "checkpoint_format": "gptq_v2"}  # zero points as they are
    assert torch.equal(read(tmp_path, second, {**tensors, "qzeros": packed(zeros.t())}, (24, 64)), expected)
    tensors["g_idx"] = tensors["g_idx"].flip(0)
    with pytest.raises(CheckpointError, match="desc_act"):
        read(tmp_path, config, tensors, (24, 64))


def test_awq(tmp_path: Path) -> None:
    values, zeros = draw(16, 24, 64), draw(16, 24, 2)
    scales = torch.rand(24, 2, generator=GENERATOR).half()
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {"qweight": packed(values.t(), order), "qzeros": packed(zeros.t(), order), "scales": scales.t()}
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    expected = (values - zeros.repeat_interleave(32, dim=1)) * scales.float().repeat_interleave(32, dim=1)
    assert torch.equal(read(tmp_path, config, tensors, (24, 64)), expected)


@pytest.mark.parametrize("zeros_are_packed", [True, False])
def test_compressed_tensors_in_words(tmp_path: Path, zeros_are_packed: bool) -> None:
    values, zeros = draw(16, 24, 64), draw(16, 24, 2)
    scales = torch.rand(24, 2, generator=GENERATOR).bfloat16()
    tensors = {"weight_packed": packed(values), "weight_scale": scales, "weight_shape": torch.tensor([24, 64])}
    tensors["weight_zero_point"] = packed(zeros.t()).t() if zeros_are_packed else (zeros - 8).to(torch.int8)
    expected = (values - zeros.repeat_interleave(32, dim=1)) * scales.float().repeat_interleave(32, dim=1)
    assert torch.equal(read(tmp_path, compressed(4, False, "pack-quantized", 32), tensors, (24, 64)), expected)


@pytest.mark.parametrize("per_tensor", [True, False])
def test_compressed_tensors_in_bytes(tmp_path: Path, per_tensor: bool) -> None:
    values, scales = (draw(256, 6, 20) - 128).to(torch.int8), torch.rand(1 if per_tensor else 6, generator=GENERATOR)
    tensors = {"weight": values, "weight_scale": scales if per_tensor else scales[:, None]}
    config = compressed(8, True, "int-quantized")
    assert torch.equal(read(tmp_path, config, tensors, (6, 20)), values * scales[:, None])
    zeros = (draw(256, 6, 1) - 128).to(torch.int8)
    found = read(tmp_path, compressed(8, False, "int-quantized"), {**tensors, "weight_zero_point": zeros}, (6, 20))
    assert torch.equal(found, (values.int() - zeros.int()) * scales[:, None])


@pytest.mark.parametrize("bits", range(2, 9))
def test_bytes_of_fewer_bits(tmp_path: Path, bits: int) -> None:
    half = 1 << (bits - 1)
    values, scales = (draw(2 * half, 6, 20) - half).to(torch.int8), torch.rand(6, 1, generator=GENERATOR)
    zeros, tensors = (draw(2 * half, 6, 1) - half).to(torch.int8), {"weight": values, "weight_scale": scales}
    assert torch.equal(read(tmp_path, compressed(bits, True, "int-quantized"), tensors, (6, 20)), values * scales)
    found = read(tmp_path, compressed(bits, False, "int-quantized"), {**tensors, "weight_zero_point": zeros}, (6, 20))
    assert torch.equal(found, (values.int() - zeros.int()) * scales)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_zero_point_for_the_whole_tensor(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values, scale = (draw(256, 6, 20) - 128).to(torch.int8), torch.rand(shape, generator=GENERATOR)
    zero = torch.full(shape, -37, dtype=torch.int8)
    config = compressed(8, False, "int-quantized", weights={"strategy": "tensor"})
    found = read(tmp_path, config, {"weight": values, "weight_scale": scale, "weight_zero_point": zero}, (6, 20))
    assert torch.equal(found, (values.int() + 37) * scale)


def logits(loaded: LoadedModel) -> Tensor:
    driver = PagedDriver(loaded)
    driver.add("a", [5, 17, 99, 3, 250, 8, 8, 41])
    return driver.step({"a": 8})["a"]


def dense_copy(folder: Path, target: Path, source: Path) -> Path:
    """The quantised folder's values as an ordinary float32 folder, by the definition of the scheme."""
    reader = ModelFolder.open(str(folder)).weights
    quantization = read_quantization(json.loads((folder / "config.json").read_text()))
    assert quantization is not None
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        layout = quantization.format_of(module, "Embedding" if "embed" in name else "Linear")
        if layout is not None and f"{module}.{layout.marker}" in reader:
            tensors[name] = as_floats(read_quantized(reader, module, tuple(tensor.shape), layout))  # type: ignore[arg-type]
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("head", ["", "int8"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_those_of_the_dequantised_model(tmp_path: Path, scheme: str, head: str, kernels: str) -> None:
    if head and scheme == "codebook":
        pytest.skip("codebooks leave the head as it is")
    if kernels == "cpu" and load_native() is None:
        pytest.skip("the native library was not built")
    tied = scheme != "int8"  # both ways with a head of its own and without
    source = folders.qwen3(tmp_path / "source", tie_word_embeddings=tied)
    quantised = quantize_folder(ModelFolder.open(str(source)), tmp_path / "quantised", scheme, head)
    dense = dense_copy(quantised, tmp_path / "dense", source)
    found = logits(load_model(ModelFolder.open(str(quantised)), dtype="float32", kernels=kernels))
    expected = logits(load_model(ModelFolder.open(str(dense)), dtype="float32", kernels=kernels))
    if scheme.endswith("a8"):  # activations are rounded to 8 bits on one side only
        assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.995
    else:
        assert (found - expected).abs().max() < 1e-4
    assert not torch.equal(found, logits(load_model(ModelFolder.open(str(source)), dtype="float32")))


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("family", ["t5", "t5-v1.1", "marian"])
def test_an_encoder_decoder_s_head_in_int8(tmp_path: Path, family: str, kernels: str) -> None:
    """The head, where it is tied both stacks' embedding too: as near as the rounding of what is multiplied by it."""
    if kernels == "cpu" and load_native() is None:
        pytest.skip("the native library was not built")
    source = ModelFolder.open(str(encoder_decoder(tmp_path / "source", family)))
    options: dict[str, Any] = dict(dtype="float32", kernels=kernels)

    def found(folder: ModelFolder, quantization: str = "auto") -> Tensor:
        return decode_from_source(load_model(folder, quantization=quantization, **options), [5, 17, 99], [2, 8, 8, 41])

    quantised = quantize_folder(source, tmp_path / "quantised", "int8-a8", "int8-a8")
    dense = dense_copy(quantised, tmp_path / "dense", source.path)
    ours, expected = found(ModelFolder.open(str(quantised))), found(ModelFolder.open(str(dense)))
    assert torch.nn.functional.cosine_similarity(ours, expected).min() > 0.995
    at_load = found(source, "int8")  # the layers alone
    assert torch.nn.functional.cosine_similarity(ours, at_load).min() > 0.995
    assert not torch.equal(ours, at_load) and not torch.equal(found(source), at_load)


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_layers_become_int8_as_they_are_loaded(tmp_path: Path, kernels: str) -> None:
    """As near to a folder that was quantised beforehand as its scales' rounding; a quantised one stays as it is."""
    if kernels == "cpu" and load_native() is None:
        pytest.skip("the native library was not built")
    source = ModelFolder.open(str(folders.qwen3(tmp_path / "source")))
    before = ModelFolder.open(str(quantize_folder(source, tmp_path / "quantised", "int8-a8")))
    options = dict(dtype="float32", kernels=kernels)
    loaded = load_model(source, quantization="int8", **options)
    found, expected = logits(loaded), logits(load_model(before, **options))
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.995
    assert not torch.equal(found, logits(load_model(source, **options)))
    assert "layers: int8" in loaded.report
    assert torch.equal(logits(load_model(before, quantization="int8", **options)), expected)
    with pytest.raises(CheckpointError, match="quantization=auto"):
        load_model(source, quantization="int8", backend="transformers")


def test_a_head_beside_tied_embeddings_is_used(tmp_path: Path) -> None:
    """Some tools tie the embeddings in the config, and write the head once more, quantised."""
    source = folders.llama(tmp_path / "source", tie_word_embeddings=False)
    quantised = quantize_folder(ModelFolder.open(str(source)), tmp_path / "quantised", "int8", "int8")
    expected = logits(load_model(ModelFolder.open(str(quantised)), dtype="float32"))
    change_config(quantised, tie_word_embeddings=True)
    assert torch.equal(logits(load_model(ModelFolder.open(str(quantised)), dtype="float32")), expected)


def change_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


W8 = compressed(8, True, "int-quantized")
REFUSED = [
    ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes'.*Supported are compressed-tensors"),
    ({"bits": 4}, "cannot be read"),
    ({"quant_method": "gptq", "bits": 4}, "cannot be read.*group_size"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"}, "marlin"),
    ({"quant_method": "gptq", "bits": 3, "group_size": 32}, "GPTQ with 3 bits"),
    ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemv"}, "gemv"),
    ({**W8, "format": "nvfp4-pack-quantized"}, "nvfp4"),
    ({**W8, "format": "float-quantized"}, "type 'int'"),
    ({**W8, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
    (compressed(8, True, "int-quantized", weights={"type": "float"}), "type 'float'"),
    (compressed(8, True, "int-quantized", weights={"actorder": "group"}), "reordered"),
    (compressed(9, True, "pack-quantized"), "9 bits"),
    (compressed(4, True, "float-quantized", weights={"type": "float"}), "float weights of 4 bits"),
    (compressed(8, True, "int-quantized", input_activations={"num_bits": 8, "dynamic": False}), "activations"),
    (compressed(8, True, "int-quantized", targets=["re:("]), "cannot be read"),
    (compressed(5, True, "fastserve-codebook"), "fastserve-codebook"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_cannot_be_served_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_quantization({"quantization_config": config})


def test_refusals_name_the_module(tmp_path: Path) -> None:
    awq = {"quant_method": "awq", "bits": 4, "group_size": 16}
    with pytest.raises(CheckpointError, match="m cannot be served in its quantised form: group_size is 16"):
        read(tmp_path, awq, {"qweight": draw(16, 64, 1).int()}, (8, 64))
    values = (draw(256, 6, 64) - 128).to(torch.int8)
    tensors = {"weight": values, "weight_scale": torch.rand(6, 2)}
    with pytest.raises(CheckpointError, match=r"m\.weight_scale.*shape \[6, 2\]"):
        read(tmp_path, compressed(8, True, "int-quantized"), tensors, (6, 64))
    for wrong in (values.float(), values.int(), values.view(torch.uint8)):
        tensors = {"weight": wrong, "weight_scale": torch.rand(6, 1)}
        with pytest.raises(CheckpointError, match=rf"m\.weight has type {wrong.dtype}"):
            read(tmp_path, compressed(8, True, "int-quantized"), tensors, (6, 64))
    tensors = {"weight_packed": values[:, :8], "weight_scale": torch.rand(6, 1)}
    with pytest.raises(CheckpointError, match=r"m\.weight_packed has type torch\.int8"):
        read(tmp_path, compressed(4, True, "pack-quantized"), tensors, (6, 64))


def test_biases_of_zeros_that_old_gptq_tools_added(tmp_path: Path) -> None:
    source = folders.llama(tmp_path / "source", num_hidden_layers=1)
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if "_proj." in name]:
        module, (rows, columns) = name.removesuffix(".weight"), tensors.pop(name).shape
        tensors[f"{module}.qweight"] = draw(1 << 31, columns // 8, rows).int()
        tensors[f"{module}.qzeros"] = torch.full((1, rows // 8), 0x77777777, dtype=torch.int32)  # 8, less one
        tensors[f"{module}.scales"] = torch.full((1, rows), 0.01).half()
        tensors[f"{module}.bias"] = torch.zeros(rows)
    save_file(tensors, source / "model.safetensors")
    change_config(source, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": -1})
    assert logits(load_model(ModelFolder.open(str(source)), dtype="float32")).isfinite().all()
    tensors["model.layers.0.mlp.up_proj.bias"][3] = 0.5
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has tensor model\.layers\.0\.mlp\.up_proj\.bias that its config"):
        load_model(ModelFolder.open(str(source)), dtype="float32")


def test_parts_of_one_matrix_must_be_alike(tmp_path: Path) -> None:
    source = folders.llama(tmp_path / "source")
    quantised = quantize_folder(ModelFolder.open(str(source)), tmp_path / "quantised", "int8")
    file = quantised / "model-00001.safetensors"
    tensors = load_file(file)
    prefix = "model.layers.0.self_attn.k_proj."
    for suffix in ("weight_packed", "weight_scale", "weight_shape"):
        del tensors[prefix + suffix]
    save_file({**tensors, f"{prefix}weight": torch.zeros(32, 64)}, file)
    (quantised / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"q_proj, .*k_proj, .*one matrix"):
        load_model(ModelFolder.open(str(quantised)))
    with pytest.raises(CheckpointError, match="only native architectures"):
        load_model(ModelFolder.open(str(quantised)), backend="transformers")


def test_schemes_by_name(tmp_path: Path) -> None:
    source = ModelFolder.open(str(folders.llama(tmp_path / "source")))
    for name in ("int3", "int8-g32", "int4-g48", "", "codebook-a8"):
        with pytest.raises(ConfigError, match="int4-g128"):
            quantize_folder(source, tmp_path / "target", name)
