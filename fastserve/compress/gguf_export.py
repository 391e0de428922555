"""A model folder as one GGUF file, for llama.cpp and what is built on it. The way back is `checkpoint/gguf.py`.

Weights are rounded by the `gguf` package's own block types; a folder whose matrices have 4 bits in groups of 32 becomes
Q4_0 with the same numbers, so that what GPTQ chose is what llama.cpp runs. Norms and biases stay in float32, embedding
and head in 8 bits where the layers have fewer.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastserve import __version__
from fastserve.checkpoint.folder import ModelFolder
from fastserve.checkpoint.gguf_config import METADATA_KEYS, gguf_name
from fastserve.checkpoint.quantization import KV_CACHE_SCALES, Quantization, read_quantization
from fastserve.checkpoint.quantized import QuantizedWeight, read_quantized
from fastserve.compress.quantize import Progress
from fastserve.core.errors import ConfigError
from fastserve.models.rope import read_rope

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
_OUTSIDE = ("token_embd", "output")
# What llama.cpp calls the ways in which byte-level tokenizers cut text, by a part of their pattern that no other has.
_CUTS = ((r"\p{N}{1,3}", "llama-bpe"), (r"\p{L}+|\p{N}|", "qwen2"))
_QUANTIZED_SUFFIXES = ("weight_packed", "qweight", "weight_scale", "bitmask", "left_factor")
_NOT_WRITTEN = re.compile(rf"{KV_CACHE_SCALES}|.*\.rotary_emb\.inv_freq")


def export(folder: ModelFolder, file: Path, kind: str, progress: Progress | None = None) -> Path:
    """Write `file`; its matrices are of `kind`, one of TYPES.

    Raises:
        ConfigError: no such type, an architecture or a tokenizer that has no form in GGUF here, or `file` exists.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    say = progress or (lambda *_: None)
    if kind not in TYPES:
        raise ConfigError(f"there is no GGUF type {kind!r} here; there are {', '.join(TYPES)}")
    architecture = _ARCHITECTURES.get(folder.architecture)
    if architecture is None:
        raise ConfigError(f"{folder.architecture} is not written as GGUF; {', '.join(_ARCHITECTURES)} are")
    if file.exists():
        raise ConfigError(f"{file} exists; give --out another name or remove it")
    wanted = GGMLQuantizationType[kind.upper()]
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.partial")
    writer = GGUFWriter(temporary, architecture, use_temp_file=True)
    try:
        _add_config(writer, folder, architecture)
        _add_tokenizer(writer, folder)
        total = len(folder.weights.names())
        for number, (name, values) in enumerate(_tensors(folder), 1):
            say("write GGUF", number, total)
            _add_tensor(writer, folder, gguf_name(architecture, name), values, wanted)
        say("write GGUF", total, total)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return file


def _tensors(folder: ModelFolder) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    """Every parameter by its name in the folder."""
    reader, quantization = folder.weights, read_quantization(folder.config)
    done: set[str] = set()
    for name in reader.names():
        module, _, suffix = name.rpartition(".")
        if module in done:
            continue
        if quantization is not None and any(f"{module}.{marker}" in reader for marker in _QUANTIZED_SUFFIXES):
            done.add(module)
            yield f"{module}.weight", _quantized(folder, module, quantization)
            if f"{module}.bias" in reader:
                yield f"{module}.bias", reader.view(f"{module}.bias", reader.shape(f"{module}.bias"))
        elif suffix in ("weight", "bias"):
            yield name, reader.view(name, reader.shape(name))
        elif not _NOT_WRITTEN.fullmatch(name):
            raise ConfigError(f"{folder.path} has a tensor {name}, for which GGUF has no form here")
        reader.release(name)


def _quantized(folder: ModelFolder, module: str, quantization: Quantization) -> Tensor | QuantizedWeight:
    reader = folder.weights
    class_name = "Embedding" if module.endswith("embed_tokens") else "Linear"
    layout = quantization.format_of(module, class_name)
    assert layout is not None
    if layout.layout in ("gptq", "gptq_v2", "awq"):
        raise ConfigError("GPTQ and AWQ folders of others are not written as GGUF; give the folder they were made from")
    sizes = next((f"{module}.{name}" for name in ("weight_shape", "shape") if f"{module}.{name}" in reader), "")
    if f"{module}.left_factor" in reader:
        rows, columns = reader.shape(f"{module}.left_factor")[0], reader.shape(f"{module}.right_factor")[-1]
    else:
        rows, columns = reader.view(sizes, (2,)).tolist() if sizes else reader.shape(f"{module}.weight")
    return read_quantized(reader, module, (rows, columns), layout)


def _add_tensor(
    writer: GGUFWriter, folder: ModelFolder, name: str, weight: Tensor | QuantizedWeight, kind: GGMLQuantizationType
) -> None:
    from gguf import GGMLQuantizationType as Kinds
    from gguf import quantize

    module = name.rpartition(".")[0].rpartition(".")[2]
    order = None
    if writer.arch == "llama" and module in ("attn_q", "attn_k"):
        heads = int(folder.config["num_attention_heads" if module == "attn_q" else "num_key_value_heads"])
        rows = (weight.values if isinstance(weight, QuantizedWeight) else weight).shape[0]
        order = torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)  # neighbours rotate there, not halves
    if isinstance(weight, QuantizedWeight) and kind is Kinds.Q4_0 and _is_q4_0(weight):
        blocks = _q4_0_blocks(weight)
        writer.add_tensor(name, (blocks if order is None else blocks[order]).numpy(), raw_dtype=Kinds.Q4_0)
        return
    values = (weight.dequantize() if isinstance(weight, QuantizedWeight) else weight).float()
    values = values if order is None else values[order]
    if values.dim() < 2:
        kind = Kinds.F32
    elif values.shape[1] % 32 and kind not in (Kinds.F32, Kinds.F16, Kinds.BF16):
        kind = Kinds.F16
    elif module in _OUTSIDE and kind not in (Kinds.F32, Kinds.F16, Kinds.BF16):
        kind = Kinds.Q8_0
    writer.add_tensor(name, quantize(values.contiguous().numpy(), kind), raw_dtype=kind)


def _is_q4_0(weight: QuantizedWeight) -> bool:
    scheme = weight.scheme
    is_grid = scheme.weight_bits == 4 and scheme.is_symmetric and not scheme.has_codebook
    return is_grid and scheme.group_size == 32 and weight.values.shape[1] % 32 == 0


def _q4_0_blocks(weight: QuantizedWeight) -> Tensor:
    """[N, K / 32 * 18] uint8: a block has its scale in float16, then value i low and value i + 16 high in byte i."""
    values = weight.values.view(len(weight.values), -1, 32)
    scales = weight.scales.to(torch.float16).unsqueeze(-1).contiguous().view(torch.uint8)
    return torch.cat([scales, values[..., :16] | values[..., 16:] << 4], dim=-1).flatten(1)


def _add_config(writer: GGUFWriter, folder: ModelFolder, architecture: str) -> None:
    config = dict(folder.config)
    heads = int(config["num_attention_heads"])
    size = int(config.get("head_dim") or config["hidden_size"] // heads)
    config |= {"head_dim": size, "num_key_value_heads": config.get("num_key_value_heads") or heads}
    if not config.get("use_sliding_window", True):
        config["sliding_window"] = None
    writer.add_name(folder.name)
    writer.add_description(f"made by fastserve {__version__}")
    for key, name in METADATA_KEYS.items():
        value = config.get(key)
        if value is not None:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{architecture}.{name}", value)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_vocab_size(int(config["vocab_size"]))
    rope: dict[str, Any] = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    scaling = config.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    theta = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    writer.add_rope_freq_base(theta)
    if kind == "llama3":
        stretched, _ = read_rope(config, size).frequencies()
        usual, _ = read_rope({"rope_theta": theta}, size).frequencies()
        writer.add_tensor("rope_freqs.weight", (usual / stretched).float().numpy())
    elif kind in ("linear", "yarn"):
        writer.add_string(f"{architecture}.rope.scaling.type", kind)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
        if kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(int(scaling["original_max_position_embeddings"]))
    elif kind != "default":
        raise ConfigError(f"rope of type {kind!r} is not written as GGUF; default, linear, yarn and llama3 are")


def _add_tokenizer(writer: GGUFWriter, folder: ModelFolder) -> None:
    from gguf import TokenType

    file = folder.path / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"{folder.path} has no tokenizer.json, which a GGUF file takes its tokens from")
    content = json.loads(file.read_text(encoding="utf-8"))
    model = content["model"]
    if model["type"] != "BPE":
        raise ConfigError(f"tokenizers of type {model['type']} are not written as GGUF; BPE is")
    tokens = {index: token for token, index in model["vocab"].items()}
    added = {item["id"]: item for item in content["added_tokens"]}
    tokens |= {index: item["content"] for index, item in added.items()}
    size = int(folder.config["vocab_size"])
    is_byte_level = not model.get("byte_fallback")
    kinds = []
    for index in range(size):
        token = tokens.get(index)
        if token is None:
            kinds.append(TokenType.UNUSED)
        elif index in added:
            kinds.append(TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED)
        elif not is_byte_level and len(token) == 6 and token.startswith("<0x"):
            kinds.append(TokenType.BYTE)
        else:
            kinds.append(TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2" if is_byte_level else "llama")
    if is_byte_level:
        writer.add_tokenizer_pre(_cut_of(content))
    writer.add_token_list([tokens.get(index, f"[unused{index}]") for index in range(size)])
    writer.add_token_types(kinds)
    if is_byte_level:
        writer.add_token_merges([item if isinstance(item, str) else " ".join(item) for item in model["merges"]])
    else:
        writer.add_token_scores([-float(index) for index in range(size)])
    _add_special_tokens(writer, folder, content)


def _cut_of(content: Any) -> str:
    patterns = json.dumps(content.get("pre_tokenizer"))
    if '"Split"' not in patterns:
        return "gpt-2"
    for part, name in _CUTS:
        if json.dumps(part)[1:-1] in patterns:
            return name
    raise ConfigError("llama.cpp has no name for the way in which this tokenizer cuts text; GGUF cannot hold it")


def _add_special_tokens(writer: GGUFWriter, folder: ModelFolder, content: Any) -> None:
    config = folder.config
    if (begin := config.get("bos_token_id")) is not None:
        writer.add_bos_token_id(int(begin))
    if ends := folder.eos_token_ids:
        writer.add_eos_token_id(ends[0])
    if config.get("pad_token_id") is not None:
        writer.add_pad_token_id(int(config["pad_token_id"]))
    processor = json.dumps(content.get("post_processor"))
    token = next((item["content"] for item in content["added_tokens"] if item["id"] == begin), None)
    writer.add_add_bos_token(token is not None and json.dumps(token)[1:-1] in processor)
    template = folder.path / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))
