"""Rotation: the same network, whose weights are easier to round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastserve.checkpoint.folder import ModelFolder
from fastserve.compress.network import load_dense
from fastserve.compress.recipe import make_recipe
from fastserve.compress.rotate import orthogonal
from fastserve.compress.run import compress
from fastserve.core.errors import ConfigError
from tests import folders
from tests.unit.compress.test_quantize import logits, served_logits


def recipe(*steps: dict[str, Any]) -> Any:
    return make_recipe({"steps": list(steps)})


@pytest.mark.parametrize("size", [16, 48])
def test_rotations_are_rotations(size: int) -> None:
    matrix = orthogonal(size, 3)
    assert torch.allclose(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert not torch.equal(matrix, orthogonal(size, 4))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "llama3"])
def test_a_rotated_network_computes_the_same(tmp_path: Path, family: str) -> None:
    source = folders.FAMILIES[family](tmp_path / "source")
    folder = compress(str(source), tmp_path / "out", recipe({"do": "rotate"}))
    before = logits(load_dense(ModelFolder.open(str(source))), folder)
    assert torch.allclose(logits(load_dense(folder), folder), before, atol=2e-4 * float(before.abs().max()))
    assert torch.allclose(
        served_logits(source)[-1], served_logits(folder.path)[-1], atol=2e-4 * float(before.abs().max())
    )
    assert "lm_head.weight" in folder.weights and folder.config["tie_word_embeddings"] is False


def test_rounding_after_it_loses_less_where_features_stand_out(tmp_path: Path) -> None:
    source = folders.llama(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for name, values in tensors.items():
        if values.dim() == 2 and values.shape[1] == 64 and ".layers." in name:
            values[:, 7] *= 20  # one feature of the stream
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    original = logits(load_dense(ModelFolder.open(str(source))), ModelFolder.open(str(source)))
    quantize = {"do": "quantize", "bits": 4, "group_size": 0, "search": False}
    losses = []
    for number, steps in enumerate(([quantize], [{"do": "rotate"}, quantize])):
        folder = compress(str(source), tmp_path / f"out{number}", recipe(*steps))
        losses.append(float((logits(load_dense(folder), folder) - original).square().mean()))
    assert losses[1] < 0.8 * losses[0]


def test_other_networks_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("bert", "t5"):
        with pytest.raises(ConfigError, match="cannot be rotated"):
            compress(str(models[kind]), tmp_path / "out", recipe({"do": "rotate"}))
    assert not list(tmp_path.iterdir())
