"""Write a model folder again with its linears quantised, rounded to the nearest value: for benchmarks and tests.

One scheme for all linears of the layers, named as in `parse_scheme`; the output projection stays as it is, or becomes
8-bit: with tied embeddings it is the embedding that does, and serves both. The folder is in compressed-tensors form,
but for codebooks, which have a form of our own. Memory stays at one tensor and one shard.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve.core.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from fastserve.checkpoint.folder import ModelFolder
    from fastserve.checkpoint.quantized import QuantizedWeight, QuantScheme
    from fastserve.compress.storage import ModuleScheme

SCHEMES = "int8, int4 (that is int4-g128), int4-g32, int4-g64, int4-g128, each also with -asym, -a8 or both; codebook"
_NAME = re.compile(r"int(?P<bits>[48])(-g(?P<group>32|64|128))?(?P<asym>-asym)?(?P<a8>-a8)?")
_LINEAR = re.compile(r".*\.layers\.\d+\..*(_proj|\.fc[12])|.*\.block\.\d+\.layer\.\d+\.\w+\.(q|k|v|o|w[io](_[01])?)")
_MAX_SHARD_BYTES = 1 << 30
_Tensors = dict[str, "torch.Tensor"]


def parse_scheme(name: str) -> QuantScheme:
    """The scheme of a name such as int8, int8-a8, int4-g32-asym or codebook.

    Raises:
        ConfigError: no such scheme.
    """
    from fastserve.checkpoint.quantized import QuantScheme

    if name == "codebook":
        return QuantScheme(4, has_codebook=True)
    found = _NAME.fullmatch(name)
    if found is None or (found["bits"] == "8" and found["group"]):
        raise ConfigError(f"there is no weight scheme {name!r}; there are {SCHEMES}")
    group = int(found["group"] or 128) if found["bits"] == "4" else 0
    return QuantScheme(int(found["bits"]), group, not found["asym"], 8 if found["a8"] else 16)


def quantize_folder(source: ModelFolder, target: Path, weights: str, head: str = "") -> Path:
    """Write `source` to the new folder `target` (see `new_folder`) with `weights` (see `parse_scheme`) and the head as
    it is, "int8", or "int8-a8" (its inputs in 8 bits, too).

    Raises:
        ConfigError: no such scheme, or a head that cannot be had with it.
        FileExistsError: `target` exists and is not empty.
    """
    from safetensors.torch import save_file

    scheme = parse_scheme(weights)
    if head not in ("", "int8", "int8-a8") or (head and scheme.has_codebook):
        raise ConfigError("the head stays as it is, or becomes int8 or int8-a8 beside int4 or int8 weights")
    head_module = _head_of(source) if head else ""
    weight_map: dict[str, str] = {}
    with new_folder(target) as unfinished:
        for number, tensors in enumerate(_shards(_converted(source, scheme, head_module, head)), 1):
            file = f"model-{number:05d}.safetensors"
            save_file(tensors, unfinished / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(tensors, file))
        for other in source.path.iterdir():
            if other.is_file() and other.suffix != ".safetensors":
                shutil.copyfile(other, unfinished / other.name)
        config = {**source.config, "quantization_config": _describe(scheme, head_module, head)}
        index = {"metadata": {}, "weight_map": weight_map}
        for name, value in (("config.json", config), ("model.safetensors.index.json", index)):
            (unfinished / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    return target


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` when it is complete; interrupted work leaves nothing there.

    Raises:
        FileExistsError: `folder` exists and is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; name a new folder or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        for file in unfinished.iterdir():
            file.chmod(0o644)
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _head_of(source: ModelFolder) -> str:
    """The module of the output projection: the embedding, where they are tied."""
    if not source.config.get("tie_word_embeddings"):
        return "lm_head"
    names = ("model.embed_tokens", "model.shared", "shared")  # of decoders, BART and its kin, T5
    return next(name for name in names if f"{name}.weight" in source.weights)


def _converted(
    source: ModelFolder, scheme: QuantScheme, head_module: str, head: str
) -> Iterator[tuple[str, torch.Tensor]]:
    from fastserve.bench.rounding import quantize

    reader = source.weights
    levels: dict[str, torch.Tensor] = {}  # modules of one parent share a codebook, so that they can be merged
    for name in reader.names():
        module = name.removesuffix(".weight")
        tensor = reader.view(name, reader.shape(name))
        if module == head_module:
            yield from _tensors(module, quantize(tensor, parse_scheme(head), tensor.dtype)).items()
        elif name.endswith(".weight") and _LINEAR.fullmatch(module):
            parent = module.rpartition(".")[0]
            quantized = quantize(tensor, scheme, tensor.dtype, levels.get(parent))
            if quantized.codebook is not None:
                levels[parent] = quantized.codebook
            yield from _tensors(module, quantized).items()
        else:
            yield name, tensor.clone()
        reader.release(name)


def _tensors(module: str, weight: QuantizedWeight) -> _Tensors:
    from fastserve.compress.grid import Quantized
    from fastserve.compress.storage import tensors

    own = _stored(weight.scheme)
    return tensors(module, Quantized(own.weights, weight.values, weight.scales, weight.zeros, weight.codebook), own)


def _describe(scheme: QuantScheme, head_module: str, head: str) -> dict[str, Any]:
    from fastserve.compress.storage import config_of, group

    groups = {"group_0": group(_stored(scheme), ["Linear"])}
    if head_module:
        groups["group_1"] = group(_stored(parse_scheme(head)), [head_module])
    return config_of(groups, [] if head_module == "lm_head" else ["lm_head"])


def _stored(scheme: QuantScheme) -> ModuleScheme:
    """The scheme as folders have it."""
    from fastserve.compress.grid import WeightScheme
    from fastserve.compress.storage import ModuleScheme

    kind = "codebook" if scheme.has_codebook else "int"
    weights = WeightScheme(scheme.weight_bits, scheme.group_size, scheme.is_symmetric, kind)
    return ModuleScheme(weights, "dynamic" if scheme.activation_bits == 8 else "none")


def _shards(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[_Tensors]:
    shard: _Tensors = {}
    for name, tensor in tensors:
        shard[name] = tensor
        if sum(item.nbytes for item in shard.values()) > _MAX_SHARD_BYTES:
            yield shard
            shard = {}
    yield shard
