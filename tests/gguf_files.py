"""Small GGUF files, written with llama.cpp's package from folders of `tests/folders.py`, as its converter would."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
PLAIN_NORMS = {"post_attention_layernorm": "ffn_norm"}
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
KEYS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
Choose = Callable[[str, np.ndarray], Any]


def plain(name: str, values: np.ndarray) -> None:
    """Every tensor in float32."""


def write_gguf(
    folder: Path,
    file: Path,
    architecture: str,
    choose: Choose = plain,
    frequency_factors: list[float] | None = None,
    leave_out: tuple[str, ...] = (),
) -> Path:
    """The model of `folder` as the GGUF file `file`.

    Args:
        choose: for a tensor of the file, its quantisation type, or (bytes, type), or None for float32.
        leave_out: keys of metadata that the file lacks, and names of tensors.
    """
    from gguf import GGUFWriter, quantize
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(file, architecture)
    for name, key in KEYS.items():
        value = config.get(name)
        if value is not None and key not in leave_out:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"{architecture}.{key}", value)
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    writer.add_float32(f"{architecture}.rope.freq_base", rope.get("rope_theta", 10000.0))
    _add_tokenizer(writer, folder)
    if frequency_factors:
        writer.add_tensor("rope_freqs.weight", np.array(frequency_factors, np.float32))
    tensors = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    for name, values in tensors.items():
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if architecture.startswith("gemma") and "norm" in name:
            values = values + 1
        new = gguf_name(name, architecture)
        if new in leave_out:
            continue
        chosen = choose(new, values)
        if chosen is None:
            writer.add_tensor(new, np.ascontiguousarray(values, np.float32))
        elif isinstance(chosen, tuple):
            writer.add_tensor(new, chosen[0], raw_dtype=chosen[1])
        else:
            writer.add_tensor(new, quantize(np.ascontiguousarray(values, np.float32), chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def gguf_name(name: str, architecture: str) -> str:
    names = NAMES | (GEMMA_NORMS if architecture in ("gemma2", "gemma3") else PLAIN_NORMS)
    module, _, suffix = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, layer, role = module.split(".", 3)
        return f"blk.{layer}.{names[role]}.{suffix}"
    return f"{names[module]}.{suffix}"


def _add_tokenizer(writer: Any, folder: Path) -> None:
    from gguf import TokenType

    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = sorted(content["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["content"] for token in content["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token, _ in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
