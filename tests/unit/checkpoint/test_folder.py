"""Finding and reading a model folder, and what its errors tell the user to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastserve.checkpoint import folder as folder_module
from fastserve.checkpoint.folder import ModelFolder
from fastserve.core.errors import CheckpointError


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """The smallest folder that opens; its weights are not looked at."""
    path = tmp_path / "small"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "eos_token_id": 7}))
    (path / "model.safetensors").write_bytes(b"")
    return path


def test_opens_a_path(plain: Path) -> None:
    folder = ModelFolder.open(str(plain))
    assert folder.path == plain
    assert folder.name == "small"
    assert folder.architecture == "LlamaForCausalLM"
    assert folder.generation_config == {}
    assert folder.shards == [plain / "model.safetensors"]


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        (7, None, (7,)),
        ([7, 8], None, (7, 8)),
        (7, 9, (9,)),
        (7, [9, 10], (9, 10)),
        (None, None, ()),
        (0, None, (0,)),
    ],
)
def test_end_tokens(plain: Path, config: object, generation: object, expected: tuple[int, ...]) -> None:
    (plain / "config.json").write_text(json.dumps({"eos_token_id": config}))
    if generation is not None:
        (plain / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert ModelFolder.open(str(plain)).eos_token_ids == expected


def test_builtin(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "BUILTIN_FOLDER", plain)
    assert ModelFolder.open("").name == "fastserve-builtin"
    (plain / "fastserve.json").write_text(json.dumps({"name": "storyteller"}))
    assert ModelFolder.open("").name == "storyteller"
    monkeypatch.setattr(folder_module, "BUILTIN_FOLDER", plain / "nowhere")
    with pytest.raises(CheckpointError, match="no built-in model"):
        ModelFolder.open("")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no model folder"):
        ModelFolder.open(str(tmp_path / "nowhere"))


def test_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(name: str, **options: object) -> str:
        assert name == "someone/some-model"
        patterns = options["allow_patterns"]
        assert isinstance(patterns, list) and not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in patterns)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match="give its path"):
        ModelFolder.open("someone/some-model")


def test_hub_id_with_a_network(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(plain))
    assert ModelFolder.open("someone/some-model").name == "some-model"


def test_no_config(plain: Path) -> None:
    (plain / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        ModelFolder.open(str(plain))


@pytest.mark.parametrize("text", ["{", "[1]", "\xff\xfe"])
def test_damaged_config(plain: Path, text: str) -> None:
    (plain / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelFolder.open(str(plain))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("pytorch_model.bin", "save_pretrained"),
        ("adapter_config.json", "adapter"),
        ("notes.txt", "no \\*\\.safetensors file"),
    ],
)
def test_no_safetensors(plain: Path, file: str, message: str) -> None:
    (plain / "model.safetensors").unlink()
    (plain / file).write_text("{}")
    with pytest.raises(CheckpointError, match=message):
        ModelFolder.open(str(plain))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "model-1.safetensors", "b": "model-2.safetensors"}, "lacks model-2.safetensors"),
        ({"a": "../outside.safetensors"}, "no plain file name"),
        ({}, "weight_map"),
    ],
)
def test_index(plain: Path, weight_map: dict[str, str], message: str) -> None:
    (plain / "model.safetensors").rename(plain / "model-1.safetensors")
    (plain / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        ModelFolder.open(str(plain))


def test_a_single_file_beside_an_index_of_before(plain: Path) -> None:
    weight_map = {"a": "model-1.safetensors"}
    (plain / "model-1.safetensors").write_bytes(b"")
    (plain / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    folder = ModelFolder.open(str(plain))
    assert folder.shards == [plain / "model.safetensors"] and folder.weight_map == {}
