"""A LoRA adapter folder as peft writes it: adapter_config.json and adapter_model.safetensors.

Read into A and B of each module, B times the adapter's factor (alpha / r, or alpha / sqrt(r) with rslora), so that what
a module adds is B A x. Which matrix of a network a module is, is decided in `engine/adapters.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastserve.checkpoint.folder import read_json
from fastserve.checkpoint.weights import WeightReader
from fastserve.core.errors import CheckpointError

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<part>[AB])(\.default)?\.weight")
# What would change the network otherwise than by B A x; each with the values that ask for nothing.
_UNUSUAL: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "use_dora": (False,),
    "modules_to_save": ([],),
    "trainable_token_indices": ([], {}),
    "alora_invocation_tokens": ([],),
    "lora_bias": (False,),
}


def read_adapter(folder: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module name -> A [R, K] and B [N, R], float32.

    Raises:
        CheckpointError: no adapter folder, another kind than LoRA, or damaged; the message says which.
    """
    try:
        path = Path(folder).expanduser()
        is_adapter = (path / _CONFIG).is_file() and (path / _WEIGHTS).is_file()
    except (OSError, RuntimeError, ValueError) as error:  # of names too long, folders closed to us, users unknown
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    if not is_adapter:
        raise CheckpointError(f"{path} is no adapter folder: it needs {_CONFIG} and {_WEIGHTS}, as peft writes them")
    config = _read_config(path / _CONFIG)
    reader = WeightReader([path / _WEIGHTS])
    pairs: dict[str, dict[str, str]] = {}
    for name in reader.names():
        match = _NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"{path}: tensor {name} is no LoRA matrix of a linear layer; such adapters are not served"
            )
        pairs.setdefault(match["module"], {})[match["part"]] = name
    try:
        return {module: _read_pair(path, config, reader, module, names) for module, names in pairs.items()}
    finally:
        reader.close()


def _read_pair(
    path: Path, config: Mapping[str, Any], reader: WeightReader, module: str, names: Mapping[str, str]
) -> tuple[Tensor, Tensor]:
    if set(names) != {"A", "B"}:
        raise CheckpointError(f"{path}: {module} has lora_{next(iter(names))} alone; A and B are needed")
    shapes = [reader.shape(names[part]) for part in "AB"]
    if any(len(shape) != 2 or 0 in shape for shape in shapes) or shapes[0][0] != shapes[1][1]:
        raise CheckpointError(
            f"{path}: {module} has A of shape {shapes[0]} and B of shape {shapes[1]}, which do not fit"
        )
    a, b = (torch.empty(shape) for shape in shapes)
    reader.read_into(names["A"], a)
    reader.read_into(names["B"], b)
    if not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
        raise CheckpointError(f"{path}: {module} has numbers that are not finite")
    alphas = [value for end, value in (config.get("alpha_pattern") or {}).items() if f".{module}".endswith(f".{end}")]
    alpha = (alphas or [config.get("lora_alpha", 8)])[0]
    return a, b * (alpha / (math.sqrt(len(a)) if config.get("use_rslora") else len(a)))


def _read_config(file: Path) -> dict[str, Any]:
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{file} does not say peft_type LORA; other kinds of adapters are not served")
    for name, usual in _UNUSUAL.items():
        if config.get(name) not in (None, *usual):
            raise CheckpointError(f"{file}: {name}={config[name]!r} is not served; only plain LoRA matrices are")
    alphas = config.get("alpha_pattern") or {}
    if not isinstance(alphas, dict) or not all(re.fullmatch(r"[\w.]+", key) for key in alphas):
        raise CheckpointError(f"{file}: alpha_pattern must give ends of module names; expressions are not read")
    if not all(
        isinstance(value, (int, float)) and 0 < value < 2**31
        for value in (config.get("lora_alpha", 8), *alphas.values())
    ):
        raise CheckpointError(f"{file}: lora_alpha must be a number above 0")
    return config
