"""What sentence-transformers keeps beside a network: modules (pooling, dense, normalise), prompts, longest text.

Only plain JSON and safetensors are read; a module that is not known is refused by name. Imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastserve.checkpoint.folder import ModelFolder, read_json
from fastserve.core.errors import CheckpointError

_ACTIVATIONS = {"Identity": "", "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu"}
_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True, slots=True)
class DenseModule:
    """A linear layer on the pooled vector: the folder of its weights, sizes, and what follows it ("" or a name)."""

    folder: Path
    num_inputs: int
    num_outputs: int
    has_bias: bool
    activation: str


@dataclass(frozen=True, slots=True)
class SentenceModules:
    """From hidden states to a text's vector.

    Attributes:
        poolings: names of sentence-transformers' pooling modes, whose vectors are joined in this order.
        normalize: whether vectors have length 1.
        max_length: longest text in tokens; 0 when it is not said.
        prompts: name -> text that goes before.
        default_prompt: the name that is used when none is asked for, or "".
    """

    poolings: tuple[str, ...] = ("mean",)
    dense: tuple[DenseModule, ...] = ()
    normalize: bool = False
    max_length: int = 0
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str = ""

    @classmethod
    def read(cls, folder: ModelFolder) -> SentenceModules | None:
        """The modules of a folder; None for one that has none.

        Raises:
            CheckpointError: a module that is not known, or damaged JSON.
        """
        if not folder.has("modules.json"):
            return None
        poolings: tuple[str, ...] = ()
        dense: list[DenseModule] = []
        normalize = False
        for module in _read_list(folder.path / "modules.json"):
            kind, path = str(module.get("type", "")).rsplit(".", 1)[-1], folder.path / str(module.get("path", ""))
            if folder.path.resolve() not in (path.resolve(), *path.resolve().parents):
                raise CheckpointError(f"{folder.path}/modules.json names a module outside of the folder: {path}")
            if kind == "Pooling":
                poolings = _read_poolings(path)
            elif kind == "Dense":
                dense.append(_read_dense(path))
            elif kind == "Normalize":
                normalize = True
            elif kind != "Transformer":
                raise CheckpointError(
                    f"{folder.path}/modules.json has a module {kind!r}; known: Transformer, Pooling, Dense, Normalize"
                )
        bert = folder.path / "sentence_bert_config.json"
        max_length = read_json(bert).get("max_seq_length") if bert.is_file() else None
        settings_file = folder.path / "config_sentence_transformers.json"
        settings = read_json(settings_file) if settings_file.is_file() else {}
        return cls(
            poolings or ("mean",),
            tuple(dense),
            normalize,
            int(max_length or 0),
            {str(name): str(text) for name, text in (settings.get("prompts") or {}).items()},
            str(settings.get("default_prompt_name") or ""),
        )


def _read_poolings(path: Path) -> tuple[str, ...]:
    config = read_json(path / "config.json")
    if config.get("include_prompt") is False:
        raise CheckpointError(f"{path} leaves prompts out of the pooling, which is not supported")
    modes = config.get("pooling_mode")
    if modes is not None:
        named = tuple(modes.split("+")) if isinstance(modes, str) else tuple(modes)
    else:
        named = tuple(mode for key, mode in _POOLINGS.items() if config.get(key))
    if not named or set(named) - set(_POOLINGS.values()):
        raise CheckpointError(f"{path} has no pooling that is known; known: {', '.join(_POOLINGS.values())}")
    return named


def _read_dense(path: Path) -> DenseModule:
    config = read_json(path / "config.json")
    activation = str(config.get("activation_function", "Tanh")).rsplit(".", 1)[-1]
    if activation not in _ACTIVATIONS:
        raise CheckpointError(f"{path} has activation {activation!r}; known: {', '.join(_ACTIVATIONS)}")
    if not (path / "model.safetensors").is_file():
        raise CheckpointError(
            f"{path} has no model.safetensors; save the folder again with a newer sentence-transformers"
        )
    sizes = int(config["in_features"]), int(config["out_features"])
    return DenseModule(path, *sizes, bool(config.get("bias", True)), _ACTIVATIONS[activation])


def _read_list(file: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise CheckpointError(f"{file} is no list of modules; the file is damaged")
    return content
