"""Write a model folder of a known shape with seeded random weights, shard by shard.

The folder is an ordinary Hugging Face one (config, sharded safetensors with index, tokenizer with chat template,
generation_config) that transformers and every peer loads. Memory stays at one shard whatever the model's size: each
tensor's numbers depend only on the seed and its name. The tokenizer is a real byte-level BPE trained on Python's own
standard library; its 8,000 tokens fill the beginning of the model's vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from fastserve.bench.quantized_model import new_folder, quantize_folder
from fastserve.bench.shapes import Shape, TensorSpec, shape
from fastserve.checkpoint.folder import ModelFolder
from fastserve.core.cache import cache_folder

if TYPE_CHECKING:
    import torch

RECIPE = 1  # raise when the contents of a folder change, so that cached ones are made again
TOKENIZER_SIZE = 8000
MAX_SHARD_BYTES = 1 << 30
STANDARD_DEVIATION = 0.02
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(name: str, folder: Path | None = None, seed: int = 0) -> Path:
    """The folder of the shape called `name`; without `folder`, a cached one is used, or made.

    Raises:
        ConfigError: no such shape.
        FileExistsError: `folder` exists and is not empty.
    """
    wanted = shape(name)
    if folder is not None:
        return write(wanted, folder, seed)
    recipe = json.dumps([RECIPE, seed, wanted.config], sort_keys=True)
    folder = cache_folder() / "models" / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:10]}"
    return folder if folder.is_dir() else write(wanted, folder, seed)


def make_quantized(name: str, weights: str, head: str = "", folder: Path | None = None, seed: int = 0) -> Path:
    """As `make`, with the linears quantised (see `quantized_model.quantize_folder`)."""
    source = make(name, None, seed)
    if folder is None:
        folder = source.with_name("-".join(filter(None, (source.name, weights, head and f"head-{head}"))))
        if (folder / "config.json").is_file():
            return folder
    return quantize_folder(ModelFolder.open(str(source)), folder, weights, head)


def write(wanted: Shape, folder: Path, seed: int = 0) -> Path:
    """Write `wanted` to `folder` (see `quantized_model.new_folder`)."""
    with new_folder(folder) as unfinished:
        _write_weights(wanted, unfinished, seed)
        _write_settings(wanted, unfinished)
        write_tokenizer(unfinished, min(TOKENIZER_SIZE, wanted.config["vocab_size"]))
    return folder


def _write_weights(wanted: Shape, folder: Path, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    dtype = getattr(torch, wanted.config["dtype"])
    shards = _split(wanted.tensors, dtype.itemsize)
    weight_map: dict[str, str] = {}
    for number, specs in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {spec.name: _fill(spec, seed, dtype) for spec in specs}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    if len(shards) > 1:
        total = wanted.num_parameters * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _split(specs: tuple[TensorSpec, ...], item_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        spec_bytes = item_bytes
        for length in spec.shape:
            spec_bytes *= length
        if shards[-1] and size + spec_bytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec_bytes
    return shards


def _fill(spec: TensorSpec, seed: int, dtype: torch.dtype) -> torch.Tensor:
    import torch

    if spec.fill == "ones":
        return torch.ones(spec.shape, dtype=dtype)
    if spec.fill == "zeros":
        return torch.zeros(spec.shape, dtype=dtype)
    if spec.fill == "sinusoid":
        return _sinusoid(*spec.shape).to(dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{spec.name}".encode()))
    return torch.randn(spec.shape, generator=generator).mul_(STANDARD_DEVIATION).to(dtype)


def _sinusoid(positions: int, size: int) -> torch.Tensor:
    """Sines in the first half of the columns, cosines in the second: [positions, size]."""
    import torch

    frequency = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def _write_settings(wanted: Shape, folder: Path) -> None:
    _write_json(folder / "config.json", wanted.config)
    ids = {name: wanted.config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if wanted.config.get("is_encoder_decoder"):
        ids["decoder_start_token_id"] = wanted.config["decoder_start_token_id"]
    _write_json(folder / "generation_config.json", {**ids, "do_sample": False})


def write_tokenizer(folder: Path, size: int = TOKENIZER_SIZE) -> None:
    """Train a byte-level BPE of `size` tokens on the standard library's sources, and write it with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train([str(file) for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
