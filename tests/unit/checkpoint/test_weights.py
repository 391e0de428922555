"""Streaming tensors: right values in every layout, damaged files refused by name, memory given back."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastserve.checkpoint import weights
from fastserve.checkpoint.weights import WeightReader
from fastserve.core.errors import CheckpointError


def write_raw(file: Path, header: object, data: bytes = b"") -> Path:
    """A safetensors file with whatever header the test wants."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "matrix": torch.randn(33, 7),
        "half": torch.randn(5, 4, 3).to(torch.bfloat16),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "counts": torch.arange(9, dtype=torch.int64),
        "flags": torch.tensor([True, False]),
    }


def test_reads_what_was_written(tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: Any) -> None:
    monkeypatch.setattr(weights, "_CHUNK_BYTES", 64)  # several chunks per tensor
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    reader = WeightReader([tmp_path / "a.safetensors"])
    assert sorted(reader.names()) == sorted(tensors)
    assert reader.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert name in reader
        assert reader.shape(name) == tuple(tensor.shape)
        assert reader.dtype(name) is tensor.dtype
        target = torch.full_like(tensor, 1)
        reader.read_into(name, target)
        assert torch.equal(target, tensor)
    reader.close()


def test_targets_with_other_strides_and_types(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    reader = WeightReader([tmp_path / "a.safetensors"])
    merged = torch.zeros(10, 40)
    reader.read_into("matrix", merged[1:8, 4:37].t())
    assert torch.equal(merged[1:8, 4:37], tensors["matrix"].t())
    assert merged.count_nonzero() == tensors["matrix"].count_nonzero()
    narrow = torch.zeros(33, 7, dtype=torch.float16)
    reader.read_into("matrix", narrow)
    assert torch.equal(narrow, tensors["matrix"].half())


def test_misaligned_data(tmp_path: Path) -> None:
    header = {
        "odd": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "wide": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file = write_raw(tmp_path / "a.safetensors", text, b"\x01" + struct.pack("<2f", 1.5, -2.0))
    target = torch.zeros(2)
    WeightReader([file]).read_into("wide", target)
    assert target.tolist() == [1.5, -2.0]


def test_wrong_shape_names_both(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    reader = WeightReader([tmp_path / "a.safetensors"])
    with pytest.raises(CheckpointError, match=r"matrix.*\[33, 7\].*\[7, 33\]"):
        reader.read_into("matrix", torch.zeros(7, 33))
    with pytest.raises(CheckpointError, match="no tensor other"):
        reader.read_into("other", torch.zeros(1))


def entry(start: int, end: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 8, [2])}, b"x" * 7, "tensor a ends .* truncated"),
        ({"a": entry(0, 8, [2])}, b"x" * 9, "belong to no tensor"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"x" * 12, "tensor b overlaps"),
        ({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, b"x" * 20, "tensor b leaves a gap"),
        ({"a": entry(0, 8, [3])}, b"x" * 8, "tensor a of shape"),
        ({"a": entry(8, 0, [2])}, b"x" * 8, "does not fill"),
        ({"a": entry(0, 8, [-2])}, b"x" * 8, "no whole numbers"),
        ({"a": entry(0, 8, [True, 2])}, b"x" * 8, "no whole numbers"),
        ({"a": entry(0, 8, [2**70, 0])}, b"x" * 8, "does not fill"),
        ({"a": entry(0, 1, [2], "F4")}, b"x", "type 'F4'"),
        ({"a": entry(0, 4, [1], ["F32"])}, b"xxxx", "is damaged: tensor a has a type that is no text"),  # type: ignore[arg-type]
        ({"a": {"dtype": "F32"}}, b"", "tensor a lacks"),
        ({"a": 3}, b"", "tensor a lacks"),
        ([1], b"", "no JSON object"),
        (b"{", b"", "not valid JSON"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b'{"a": 1, "a": 2}', b"", "twice"),
    ],
)
def test_damaged_file(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    file = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        WeightReader([file])
    assert "bad.safetensors" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x00\x01", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 3) + b"{}"])
def test_damaged_length(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        WeightReader([file])


def test_truncated_copy(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"a\.safetensors is damaged: tensor .* is truncated"):
        WeightReader([tmp_path / "a.safetensors"])


def test_several_files(tmp_path: Path) -> None:
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save_file({"x": torch.ones(2), "y": torch.ones(3)}, files[0])
    save_file({"x": torch.zeros(2)}, files[1])
    with pytest.raises(CheckpointError, match="tensor x is in two files"):
        WeightReader(files)
    reader = WeightReader(files, {"x": "b.safetensors", "y": "a.safetensors"})
    target = torch.full((2,), 9.0)
    reader.read_into("x", target)
    assert target.tolist() == [0.0, 0.0]
    with pytest.raises(CheckpointError, match="tensor z"):
        WeightReader(files, {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"})


_MEASURE = """
import re, sys
from pathlib import Path
from fastserve.checkpoint.folder import ModelFolder
from fastserve.models.loader import load_model

def memory(key):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024

small, large, dtype = sys.argv[1:]
load_model(ModelFolder.open(small), dtype=dtype)  # imports and thread pools are not what is measured
before = memory("VmRSS")
loaded = load_model(ModelFolder.open(large), dtype=dtype, kernels="reference")
print(loaded.model.shape.weight_bytes, memory("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 305 MB in float32, in two files."""
    folder = tmp_path_factory.mktemp("large")
    hidden, inner, layers, vocab = 1024, 2816, 5, 8192
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "vocab_size": vocab,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    first: dict[str, torch.Tensor] = {"model.embed_tokens.weight": torch.rand(vocab, hidden)}
    second = {"lm_head.weight": torch.rand(vocab, hidden), "model.norm.weight": torch.ones(hidden)}
    for layer in range(layers):
        part = first if layer < layers // 2 else second
        name = f"model.layers.{layer}."
        for linear in "qkvo":
            part[f"{name}self_attn.{linear}_proj.weight"] = torch.rand(hidden, hidden)
        part[name + "mlp.gate_proj.weight"] = torch.rand(inner, hidden)
        part[name + "mlp.up_proj.weight"] = torch.rand(inner, hidden)
        part[name + "mlp.down_proj.weight"] = torch.rand(hidden, inner)
        part[name + "input_layernorm.weight"] = torch.ones(hidden)
        part[name + "post_attention_layernorm.weight"] = torch.ones(hidden)
    index = {}
    for file, part in (("model-1.safetensors", first), ("model-2.safetensors", second)):
        save_file(part, folder / file)
        index.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_while_loading(large_folder: Path, tmp_path: Path, repository: Path, dtype: str) -> None:
    from tests import folders

    small = folders.llama(tmp_path)
    command = [sys.executable, "-c", _MEASURE, str(small), str(large_folder), dtype]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=repository, check=True)
    weight_bytes, peak_bytes = map(int, result.stdout.split())
    assert weight_bytes > 140_000_000
    assert weight_bytes * 0.9 < peak_bytes < weight_bytes * 1.1
