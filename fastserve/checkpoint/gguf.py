"""GGUF files as model folders: converted once into the Hugging Face layout, and kept in the user's cache.

So every stage takes a GGUF file where it takes a folder. Q4_0 blocks become packed 4-bit weights of groups of 32, the
same numbers exactly; all other quantised blocks are dequantised, to float16 (bfloat16 keeps too little of Q8_0). The
tokenizer is made by transformers. Reading is done with the `gguf` package of llama.cpp.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve.checkpoint.gguf_config import hugging_face_name, make_config
from fastserve.core.cache import cache_folder
from fastserve.core.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader, ReaderTensor

_RECIPE = 1  # raise when the contents of a converted folder change
_MAX_SHARD_BYTES = 1 << 30
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})")
_ROPE_FACTORS = "rope_freqs.weight"
_MERGED = (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"))  # served as one matrix: alike, or not packed
_QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
        }
    },
    "ignore": ["lm_head"],
}
_log = logging.getLogger(__name__)


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` is, or that a folder without config.json holds; None when it is something else.

    Raises:
        CheckpointError: the folder has several.
    """
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    files = sorted(path.glob("*.gguf"))
    first = [file for file in files if (part := _PART.fullmatch(file.stem)) is None or int(part[2]) == 1]
    if len(first) > 1:
        raise CheckpointError(f"{path} has several GGUF files ({', '.join(file.name for file in first)}); name one")
    return first[0] if first else None


def open_converted(file: Path) -> Path:
    """The folder made of a GGUF file: from the cache, or made now.

    Raises:
        CheckpointError: damaged, of an architecture or with tensors that are not known, or the disk is full.
    """
    parts = _parts(file)
    states = [(str(part.resolve()), part.stat().st_size, part.stat().st_mtime_ns) for part in parts]
    key = hashlib.sha256(repr((_RECIPE, states)).encode()).hexdigest()[:12]
    target = cache_folder() / "gguf" / f"{file.stem}-{key}"
    if target.is_dir():
        return target
    _log.info("converting %s into the folder %s, once", file, target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as temporary:
            made = Path(temporary) / "model"
            convert(parts, made)
            if not target.is_dir():
                made.rename(target)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be converted into {target}: {error}; make room there") from error
    return target


def convert(files: Sequence[Path], target: Path) -> None:
    """Write the new folder `target` of a GGUF file, or of the parts of one.

    Raises:
        CheckpointError: as `open_converted`.
    """
    readers = [_open(file) for file in files]
    metadata = {name: value for name, value in _metadata(readers[0]).items() if not name.startswith("split.")}
    tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{files[0]} has no tensor token_embd.weight; is it a language model, and whole?")
    factors = tensors.pop(_ROPE_FACTORS, None)
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}
    config = dict(make_config(metadata, shapes, [] if factors is None else [float(value) for value in factors.data]))
    target.mkdir(parents=True)
    packed = _packed(tensors)
    if packed:
        config["quantization_config"] = _QUANTIZATION
    is_plain = all(tensor.tensor_type.name == "F32" for tensor in tensors.values())
    config["dtype"] = "float32" if is_plain else "bfloat16"
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    generation = {"eos_token_id": list(dict.fromkeys(end for end in ends if end is not None))}
    _write_tokenizer(files[0], target)
    _write_tensors(target, _converted(tensors, packed, config, metadata["general.architecture"]), len(tensors))
    _write_json(target / "generation_config.json", generation)
    _write_json(target / "config.json", config)


def _parts(file: Path) -> list[Path]:
    """All files of a split GGUF, in order; else the one."""
    part = _PART.fullmatch(file.stem)
    if part is None:
        return [file]
    files = [file.with_name(f"{part[1]}-{number:05d}-of-{part[3]}.gguf") for number in range(1, int(part[3]) + 1)]
    if missing := [item.name for item in files if not item.is_file()]:
        raise CheckpointError(f"{file.parent} lacks {', '.join(missing)}; copy or download all parts")
    return files


def _open(file: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise CheckpointError("GGUF files are read with the gguf package: pip install gguf") from error
    try:
        return GGUFReader(file)
    except Exception as error:  # the package lets numpy's errors through, of many kinds
        raise CheckpointError(f"{file} is damaged, or no GGUF file ({error}); copy or download it again") from error


def _metadata(reader: GGUFReader) -> dict[str, Any]:
    """Values by key; long lists (the vocabulary) are left out."""
    fields = {name: field for name, field in reader.fields.items() if len(field.data) <= 1}
    return {name: field.contents() for name, field in fields.items() if field.data}


def _packed(tensors: dict[str, ReaderTensor]) -> frozenset[str]:
    """The Q4_0 matrices of layers; those that are merged only when all of them are."""

    def is_packed(name: str) -> bool:
        tensor = tensors.get(name)
        return tensor is not None and tensor.tensor_type.name == "Q4_0" and name.startswith("blk.")

    found = {name for name in tensors if is_packed(name)}
    for name in list(found):
        block, role = name.removesuffix(".weight").rsplit(".", 1)
        together = next((roles for roles in _MERGED if role in roles), (role,))
        if not all(is_packed(f"{block}.{other}.weight") for other in together):
            found.remove(name)
    return frozenset(found)


def _converted(
    tensors: dict[str, ReaderTensor], packed: frozenset[str], config: dict[str, Any], architecture: str
) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors of the folder, those of one GGUF tensor together."""
    import torch

    for name, tensor in tensors.items():
        wanted = hugging_face_name(architecture, name)
        role = name.rsplit(".", 2)[-2]
        order = None
        if architecture == "llama" and role in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if role == "attn_q" else "num_key_value_heads"]
            order = _half_split_order(int(tensor.shape[-1]), heads)
        if name in packed:
            words, scales = _pack(tensor)
            if order is not None:
                words, scales = words[order], scales[order]
            size = torch.tensor([words.shape[0], words.shape[1] * 8])
            yield {f"{wanted}_packed": words, f"{wanted}_scale": scales, f"{wanted}_shape": size}
            continue
        values = _values(tensor)
        if order is not None:
            values = values[order]
        if architecture.startswith("gemma") and role.endswith("norm"):
            values = values - 1  # GGUF has what the norm multiplies by, the layout its distance from one
        yield {wanted: values.contiguous()}


def _half_split_order(num_rows: int, num_heads: int) -> torch.Tensor:
    """Where rows of a head come from: GGUF's Llama rotates neighbours, the layout rotates halves."""
    import torch

    return torch.arange(num_rows).view(num_heads, -1, 2).transpose(1, 2).reshape(-1)


def _values(tensor: ReaderTensor) -> torch.Tensor:
    """A tensor in its own precision, dequantised when it is in blocks."""
    import torch
    from gguf import dequantize

    kind = tensor.tensor_type.name
    shape = [int(size) for size in reversed(tensor.shape)]
    if kind in ("F32", "F16"):
        return torch.from_numpy(tensor.data.copy()).view(shape)
    if kind == "BF16":
        return torch.from_numpy(tensor.data.copy()).view(torch.bfloat16).view(shape)
    try:
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).view(shape)
    except (NotImplementedError, ValueError) as error:
        raise CheckpointError(f"tensor {tensor.name} has GGUF type {kind}, which cannot be read ({error})") from error
    half = values.to(torch.float16)
    return half if bool(half.isfinite().all()) else values


def _pack(tensor: ReaderTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q4_0 -> int32 words [N, K/8], the first value lowest, and float16 scales [N, K/32].

    A block has its scale, then 16 bytes: value i low in byte i, value i + 16 high in it; 8 stands for zero.
    """
    import torch

    num_rows = int(tensor.shape[-1])
    blocks = torch.from_numpy(tensor.data.copy()).view(num_rows, -1, 18)
    scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    values = torch.cat([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], dim=-1).view(num_rows, -1, 4, 2)
    words = (values[..., 0] | values[..., 1] << 4).contiguous().view(torch.int32).squeeze(-1)
    return words, scales.contiguous()


def _write_tensors(target: Path, groups: Iterator[dict[str, torch.Tensor]], count: int) -> None:
    from rich.console import Console
    from rich.progress import track
    from safetensors.torch import save_file

    console = Console(stderr=True)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, target / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    hidden = not sys.stderr.isatty()
    for group in track(groups, "converting", total=count, console=console, transient=True, disable=hidden):
        shard.update(group)
        if sum(tensor.nbytes for tensor in shard.values()) >= _MAX_SHARD_BYTES:
            flush()
    if shard:
        flush()
    _write_json(target / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _write_tokenizer(file: Path, target: Path) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        tokenizer.save_pretrained(target)
    except Exception as error:  # transformers raises many kinds here
        shutil.rmtree(target, ignore_errors=True)
        raise CheckpointError(f"the tokenizer of {file} cannot be read: {error}") from error


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
