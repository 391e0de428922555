"""Which models a command line names: kinds, names, options, and what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastserve.core.config import EngineConfig, ServeConfig
from fastserve.core.errors import CheckpointError, ConfigError
from fastserve.serve.models import ServedModels, repository_spec


def folder(parent: Path, name: str, architecture: str) -> str:
    made = parent / name
    made.mkdir()
    (made / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    (made / "model.safetensors").write_bytes(b"")
    return str(made)


def test_models_are_sorted_by_what_they_are(tmp_path: Path) -> None:
    decoder = folder(tmp_path, "decoder", "LlamaForCausalLM")
    bert = folder(tmp_path, "bert", "BertForQuestionAnswering")
    more = f"{decoder}, rank.py:servable, net.onnx"
    served = ServedModels.of(ServeConfig(model=f"{bert}?weight=2&max_batch_tokens=77", more_models=more, name="qa,,r"))
    assert (served.name, served.generates, served.engine.model) == ("decoder", True, decoder)
    assert [(spec.name, spec.weight) for spec in served.others] == [("qa", 2.0), ("r", 1.0), ("net", 1.0)]
    assert served.others[0].options["max_batch_tokens"] == 77 and served.engine.max_batch_tokens == 1024
    assert served.others[1].options["model"] == "rank.py:servable"


def test_a_server_may_have_encoders_alone(tmp_path: Path) -> None:
    served = ServedModels.of(ServeConfig(model=folder(tmp_path, "bert", "BertModel")))
    assert (served.name, served.generates, len(served.others)) == ("bert", False, 1)
    assert served.folder is not None and served.folder.task == "feature-extraction"
    assert ServedModels.of(ServeConfig(model="net.onnx")).folder is None


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    decoder = folder(tmp_path, "decoder", "GPT2LMHeadModel")
    bert = folder(tmp_path, "bert", "BertModel")
    for options, word in (
        (dict(model=decoder, more_models=decoder), "one server has one such model"),
        (dict(model=bert, more_models=bert), "two models have one name"),
        (dict(model=bert, name="a,b"), "2 names for 1 models"),
        (dict(model=f"{bert}?weight=0"), "above 0"),
        (dict(model=f"{bert}?nothing=1"), "unknown option nothing"),
        (dict(model=f"{decoder}?weight=2"), "its weight is 1"),
    ):
        with pytest.raises(ConfigError, match=word):
            ServedModels.of(ServeConfig(**options))
    with pytest.raises(CheckpointError, match="no model folder"):
        ServedModels.of(ServeConfig(model=str(tmp_path / "none")))


def test_the_repository_is_a_fence(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    folder(inside, "bert", "BertModel")
    folder(inside, "decoder", "LlamaForCausalLM")
    folder(tmp_path, "outside", "BertModel")
    spec = repository_spec(str(inside), "bert", EngineConfig(), {"weight": 3, "dtype": "bfloat16"})
    assert (spec.name, spec.weight, spec.options["dtype"]) == ("bert", 3.0, "bfloat16")
    for name in ("../outside", "..", ".", "", "bert/../../outside", str(tmp_path / "outside")):
        with pytest.raises(ConfigError, match="has no folder"):
            repository_spec(str(inside), name, EngineConfig(), {})
    with pytest.raises(ConfigError, match="named when the server starts"):
        repository_spec(str(inside), "decoder", EngineConfig(), {})
    for option in ("draft_model", "trust_remote_code", "kv_disk_folder", "device", "num_threads", "scheduler", "model"):
        with pytest.raises(ConfigError, match=f"unknown option {option}; .* takes dtype"):
            repository_spec(str(inside), "bert", EngineConfig(), {option: "x"})
    with pytest.raises(ConfigError, match="--model-repository"):
        repository_spec("", "bert", EngineConfig(), {})
