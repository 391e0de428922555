"""Whole parts that go: operators, tokens, and how far attention looks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastserve.checkpoint.folder import ModelFolder
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.compress.network import load_dense
from fastserve.compress.run import compress
from fastserve.core.errors import ConfigError
from tests import folders
from tests.unit.compress.test_prune import recipe
from tests.unit.compress.test_quantize import logits, served_logits

UNUSED = "naïve — 你好 🦊 zebra quixotic"


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_operators_that_add_least_become_zero(models: dict[str, Path], text: Path, tmp_path: Path, kind: str) -> None:
    step = {"do": "prune", "method": "operators", "ratio": 0.25, "store": "bitmask"}
    folder = compress(str(models[kind]), tmp_path / "out", recipe(text, step))
    card = json.loads((folder.path / "fastserve.json").read_text())["compressed"]["steps"][0]
    influence = card["operator_influence"]
    assert len(influence) == {"llama": 4, "bert": 4, "t5": 10}[kind]
    model = load_dense(folder)
    zero = {name for name in influence if not bool(model.get_submodule(name).weight.any())}
    count = max(1, round(0.25 * len(influence)))
    assert zero == set(sorted(influence, key=lambda name: influence[name])[:count])
    assert all(not bool(model.get_submodule(name).weight.any()) for name in card["dropped"])
    assert folder.weight_bytes < ModelFolder.open(str(models[kind])).weight_bytes
    if kind == "llama":
        assert torch.allclose(served_logits(folder.path)[-1], logits(model, folder)[-1], atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_attention_looks_no_farther(tmp_path: Path, name: str) -> None:
    source = folders.FAMILIES[name](tmp_path / "source", num_hidden_layers=2)
    step = {"do": "window", "size": 8} | ({} if name == "llama" else {"full_every": 2})
    folder = compress(str(source), tmp_path / "out", recipe(None, step))
    model, ids = load_dense(folder), torch.randint(3, 200, (1, 40))
    other = ids.clone()
    other[0, :4] = ids[0, :4] + 1
    whole = load_dense(ModelFolder.open(str(source)))
    with torch.no_grad():
        last, changed, unlimited = (network(given).logits[0, -1] for network, given in
                                    ((model, ids), (model, other), (whole, ids)))  # fmt: skip
    is_same = torch.allclose(last, changed, atol=1e-6)
    assert is_same == (name == "llama")  # with full attention in the second layer, what went before is seen
    assert not torch.allclose(last, unlimited, atol=1e-3)
    assert torch.allclose(served_logits(folder.path)[-1], logits(model, folder)[-1], atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_tokens_that_a_text_does_not_use_go(models: dict[str, Path], text: Path, tmp_path: Path, kind: str) -> None:
    source = ModelFolder.open(str(models[kind]))
    step = {"do": "prune", "method": "vocabulary", "ratio": 0.02}
    folder = compress(str(source.path), tmp_path / "out", recipe(text, step))
    size = folder.config["vocab_size"]
    assert size == round(0.98 * source.config["vocab_size"])
    before, after = Tokenizer.load(source), Tokenizer.load(folder)
    words = text.read_text()[:200]
    old, new = before.encode(words), after.encode(words)
    assert len(old) == len(new) and max(new) < size
    for sentence in (words, UNUSED):
        assert after.decode(after.encode(sentence)) == before.decode(before.encode(sentence))
    models_ = [load_dense(item) for item in (source, folder)]
    rows = [model.get_input_embeddings().weight[ids] for model, ids in zip(models_, (old, new), strict=True)]
    assert torch.equal(*rows)
    inputs = [torch.tensor([ids[:20]]) for ids in (old, new)]
    with torch.no_grad():
        begin = [item.config.get("decoder_start_token_id") for item in (source, folder)]
        extra: list[dict[str, Any]] = [
            {} if start is None else {"decoder_input_ids": torch.tensor([[start]])} for start in begin
        ]
        found = [model(ids, **more).logits[0] for model, ids, more in zip(models_, inputs, extra, strict=True)]
    kept = dict(zip(new, old, strict=True))
    ids = sorted(kept)
    assert torch.allclose(found[1][:, ids], found[0][:, [kept[token] for token in ids]], atol=1e-5)


@pytest.mark.parametrize(
    ("step", "settings", "message"),
    [
        ({"do": "window", "size": 8, "full_every": 2}, {}, "full_every"),
        ({"do": "prune", "method": "channels", "ratio": 0.2, "store": "bitmask"}, {}, "store"),
        ({"do": "prune", "method": "vocabulary", "ratio": 0.2}, {"evaluation": True}, "leave out evaluation.text"),
    ],
)
def test_what_does_not_go_together(
    models: dict[str, Path], text: Path, tmp_path: Path, step: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    from fastserve.compress.recipe import make_recipe

    values = {"steps": [step], "calibration": {"text": str(text)}}
    values |= {"evaluation": {"text": str(text)}} if settings else {}
    with pytest.raises(ConfigError, match=message):
        compress(str(models["llama"]), tmp_path / "out", make_recipe(values))


def test_no_window_for_bert(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="BertForMaskedLM has no form with a window"):
        compress(str(models["bert"]), tmp_path / "out", recipe(None, {"do": "window", "size": 8}))
