"""A compressed folder with its weights written out: what every program loads, at the size of the original.

Values are those that the compressed ones stand for. Codebooks, zeros left out, and integers that a version of
transformers does not read back come to other programs this way. One block is in memory at a time.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from fastserve.checkpoint.folder import ModelFolder, read_json
from fastserve.checkpoint.quantization import KV_CACHE_SCALES
from fastserve.compress.folder_writer import CARD_FILE, FolderWriter
from fastserve.compress.network import Network
from fastserve.compress.quantize import Progress
from fastserve.core.errors import ConfigError

_DTYPES = ("float32", "bfloat16", "float16")


def expand(folder: ModelFolder, out: Path, progress: Progress | None = None) -> ModelFolder:
    """Write `folder` to `out` without a `quantization_config`.

    Weights take the type that config.json names, bfloat16 or another; what was compressed in float32 stays exact.

    Raises:
        ConfigError: nothing in the folder is compressed, or `out` holds something.
        CheckpointError: the folder is damaged, or transformers does not know its architecture.
    """
    if not folder.config.get("quantization_config"):
        raise ConfigError(f"{folder.path} holds no compressed weights; --dense has nothing to write out")
    say = progress or (lambda *_: None)
    network = Network(folder)
    writer = FolderWriter(out, folder, {"step": "dense"})
    parts = ["", *network.blocks]
    for number, block in enumerate(parts):
        say("write out", number, len(parts))
        if not writer.has(f"{number:04d}"):
            writer.write(f"{number:04d}", _tensors(network, block))
    say("write out", len(parts), len(parts))
    config = {key: value for key, value in folder.config.items() if key != "quantization_config"}
    return writer.finish(config, read_json(folder.path / CARD_FILE) if folder.has(CARD_FILE) else {})


def _tensors(network: Network, block: str) -> dict[str, Tensor]:
    given = str(network.folder.config.get("dtype") or network.folder.config.get("torch_dtype"))
    dtype = getattr(torch, given) if given in _DTYPES else torch.float32
    compressed = {item for item in network.parameters_of(block) if network.is_compressed(item)}
    found = {
        network.tensor_name(item): network.read(item, dtype if item in compressed else None)
        for item in network.parameters_of(block)
    }
    if not block:
        names = [item for item, _ in network.model.named_parameters() if item not in network.tied]
        modules = {network.tensor_name(item).rpartition(".")[0] for item in names if network.is_compressed(item)}
        found |= {name: network.read_other(name) for name in network.others if _is_plain(name, modules)}
    return found


def _is_plain(name: str, compressed: set[str]) -> bool:
    return name.rpartition(".")[0] not in compressed and not re.fullmatch(KV_CACHE_SCALES, name)
