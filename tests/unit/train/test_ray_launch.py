"""The Ray launcher without Ray, and what it asks of Ray where it is: a stand-in records it and runs one worker."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from fastserve.core.errors import ConfigError, FastServeError
from fastserve.train import launch
from fastserve.train.ray_launch import launch as launch_on_ray


def test_without_ray_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'ray\[train\]'"):
        launch.launch(tmp_path / "recipe.toml", tmp_path / "run", 2, 3, "ray")
    with pytest.raises(ConfigError, match="local, ray"):
        launch.check("slurm")


def test_a_worker_of_ray_does_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class Trainer:
        def __init__(self, work: Any, *, train_loop_config: dict[str, str], **others: Any) -> None:
            asked.update(others)
            self._fit = lambda: work(train_loop_config)

        def fit(self) -> None:
            self._fit()

    names = ("FailureConfig", "RunConfig", "ScalingConfig")
    ray, ray_train, ray_torch = (types.ModuleType(name) for name in ("ray", "ray.train", "ray.train.torch"))
    ray.init, ray.cluster_resources = (lambda **_: None), (lambda: {"CPU": 8.0, "GPU": 1.0})  # type: ignore[attr-defined]
    for name in names:
        setattr(ray_train, name, lambda **values: values)
    ray_torch.TorchTrainer = Trainer  # type: ignore[attr-defined]
    for module in (ray, ray_train, ray_torch):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "finetune.json"
    values = {"task": "classification", "model": "none", "data": "none.jsonl", "settings": {}}
    recipe.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(FastServeError, match=r"workers on Ray failed: none has no tokenizer.json.*last checkpoint"):
        launch_on_ray(recipe, tmp_path / "run", 2, 3)
    assert asked["scaling_config"] == {"num_workers": 2, "use_gpu": False}
    assert asked["run_config"] == {"failure_config": {"max_failures": 3}}
