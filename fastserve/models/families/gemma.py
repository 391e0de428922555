"""Gemma 2 and 3 (text): norms before and after each branch, weights stored as an offset from one, scaled embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastserve.models.decoder import DecoderConfig
from fastserve.models.families.family import Family, llama_like, number, refuse_unless, windows
from fastserve.models.families.llama import OUTPUT_NORM_NAMES
from fastserve.models.rope import Rope, read_rope


def _read_gemma2(config: Mapping[str, Any], **differences: Any) -> DecoderConfig:
    refuse_unless(config, use_bidirectional_attention=False)
    bias = bool(config.get("attention_bias", False))
    num_layers = int(number(config, "num_hidden_layers"))
    if not isinstance(config.get("layer_types"), list):  # as transformers 4 wrote it
        config = {**config, "layer_types": _alternating(num_layers, 2)}
    fields = dict(
        norm="rms-plus-one",
        norm_outputs=True,
        windows=windows(config, num_layers),
        qkv_bias=bias,
        output_bias=bias,
        activation="gelu_tanh",
        attention_scale=float(number(config, "query_pre_attn_scalar", default=256)) ** -0.5,
        attention_softcap=float(config.get("attn_logit_softcapping") or 0.0),
        embedding_scale=float(number(config, "hidden_size")) ** 0.5,
        logit_softcap=float(config.get("final_logit_softcapping") or 0.0),
    )
    # Gemma's configs leave their defaults out: embeddings are tied, heads have 256 numbers.
    config = {"tie_word_embeddings": True, "head_dim": 256, **config}
    return llama_like(config, **{**fields, **differences})


def _read_gemma3(config: Mapping[str, Any]) -> DecoderConfig:
    if not isinstance(config.get("layer_types"), list):
        pattern = int(number(config, "sliding_window_pattern", "_sliding_window_pattern", default=6))
        config = {**config, "layer_types": _alternating(int(number(config, "num_hidden_layers")), pattern)}
    by_kind = {kind: _rope(config, kind) for kind in ("full_attention", "sliding_attention")}
    ropes = tuple(by_kind.get(kind) for kind in config["layer_types"])  # strange kinds are refused with their windows
    return _read_gemma2(config, qk_norm="head", ropes=ropes)


def _alternating(num_layers: int, pattern: int) -> list[str]:
    """Every `pattern`-th layer sees everything, the others a window."""
    return ["full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(num_layers)]


def _rope(config: Mapping[str, Any], kind: str) -> Rope:
    """Layers with a window turn by a base of their own, and only the others are stretched."""
    head_size = int(number(config, "head_dim", default=256))
    if kind in (config.get("rope_parameters") or {}):
        return read_rope(config, head_size, kind)
    if kind == "full_attention":
        return read_rope(config, head_size, theta=1e6)
    plain = {"rope_theta": number(config, "rope_local_base_freq", default=10000.0)}
    return read_rope(plain, head_size)


FAMILIES: dict[str, Family] = {
    "Gemma2ForCausalLM": Family(_read_gemma2, OUTPUT_NORM_NAMES, ignored=(r".*\.rotary_emb\.inv_freq",)),
    "Gemma3ForCausalLM": Family(_read_gemma3, OUTPUT_NORM_NAMES, ignored=(r".*\.rotary_emb\.inv_freq",)),
}
