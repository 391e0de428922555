"""Llama and its relatives: RMS norms, rotary positions, gated feed-forward, one module per projection.

The relatives are differences: windows, biases, norms on queries and keys, norms after instead of before, experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastserve.core.errors import CheckpointError
from fastserve.models.decoder import DecoderConfig
from fastserve.models.families.family import Family, llama_like, number, refuse_unless, windows

LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "model.layers.{layer}.input_layernorm",
    "query": "model.layers.{layer}.self_attn.q_proj",
    "key": "model.layers.{layer}.self_attn.k_proj",
    "value": "model.layers.{layer}.self_attn.v_proj",
    "query_norm": "model.layers.{layer}.self_attn.q_norm",
    "key_norm": "model.layers.{layer}.self_attn.k_norm",
    "attention_output": "model.layers.{layer}.self_attn.o_proj",
    "mlp_norm": "model.layers.{layer}.post_attention_layernorm",
    "gate": "model.layers.{layer}.mlp.gate_proj",
    "up": "model.layers.{layer}.mlp.up_proj",
    "down": "model.layers.{layer}.mlp.down_proj",
}
# With norms after attention and feed-forward: Gemma has both kinds, OLMo2 only those.
OUTPUT_NORM_NAMES = {
    **LLAMA_NAMES,
    "attention_output_norm": "model.layers.{layer}.post_attention_layernorm",
    "mlp_norm": "model.layers.{layer}.pre_feedforward_layernorm",
    "mlp_output_norm": "model.layers.{layer}.post_feedforward_layernorm",
}
_PHI3_NAMES = {
    **{role: name for role, name in LLAMA_NAMES.items() if role not in ("query", "key", "value", "gate", "up")},
    "query_key_value": "model.layers.{layer}.self_attn.qkv_proj",
    "gate_up": "model.layers.{layer}.mlp.gate_up_proj",
}
_STARCODER2_NAMES = {
    **{role: name for role, name in LLAMA_NAMES.items() if role != "gate"},
    "up": "model.layers.{layer}.mlp.c_fc",
    "down": "model.layers.{layer}.mlp.c_proj",
}
_MIXTRAL_NAMES = {
    **LLAMA_NAMES,
    "router": "model.layers.{layer}.block_sparse_moe.gate",
    "gate": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1",
    "up": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3",
    "down": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2",
}
_QWEN3_MOE_NAMES = {
    **LLAMA_NAMES,
    "router": "model.layers.{layer}.mlp.gate",
    "gate": "model.layers.{layer}.mlp.experts.{expert}.gate_proj",
    "up": "model.layers.{layer}.mlp.experts.{expert}.up_proj",
    "down": "model.layers.{layer}.mlp.experts.{expert}.down_proj",
}


def _read_llama(config: Mapping[str, Any]) -> DecoderConfig:
    bias = bool(config.get("attention_bias", False))
    return llama_like(config, qkv_bias=bias, output_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))


def _read_mistral(config: Mapping[str, Any]) -> DecoderConfig:
    return llama_like(config, windows=windows(config, int(number(config, "num_hidden_layers"))))


def _read_qwen2(config: Mapping[str, Any]) -> DecoderConfig:
    return llama_like(config, qkv_bias=True, windows=_qwen_windows(config))


def _read_qwen3(config: Mapping[str, Any], **differences: Any) -> DecoderConfig:
    bias = bool(config.get("attention_bias", False))
    return llama_like(
        {**config, "head_dim": int(number(config, "head_dim", default=128))},
        qk_norm="head",
        qkv_bias=bias,
        output_bias=bias,
        windows=_qwen_windows(config),
        **differences,
    )


def _qwen_windows(config: Mapping[str, Any]) -> tuple[int, ...]:
    num_layers = int(number(config, "num_hidden_layers"))
    if not config.get("use_sliding_window", False):
        return (0,) * num_layers
    return windows(config, num_layers, first_layer=int(number(config, "max_window_layers", default=28)))


def _read_qwen3_moe(config: Mapping[str, Any]) -> DecoderConfig:
    if config.get("mlp_only_layers") or int(number(config, "decoder_sparse_step", default=1)) != 1:
        raise CheckpointError("layers without experts between layers with them are not known to the native modules")
    return _read_qwen3(
        config,
        mlp="experts",
        inner_size=int(number(config, "moe_intermediate_size")),
        num_experts=int(number(config, "num_experts", "num_local_experts")),
        num_active_experts=int(number(config, "num_experts_per_tok")),
        experts_sum_to_one=bool(config.get("norm_topk_prob", False)),
    )


def _read_mixtral(config: Mapping[str, Any]) -> DecoderConfig:
    return replace(
        _read_mistral(config),
        mlp="experts",
        num_experts=int(number(config, "num_local_experts")),
        num_active_experts=int(number(config, "num_experts_per_tok")),
    )


def _read_smollm3(config: Mapping[str, Any]) -> DecoderConfig:
    """Every fourth layer has no positions, as `no_rope_layers` says (0 there). Embeddings are tied by default."""
    read = _read_llama({"tie_word_embeddings": True, **config})
    interval = int(number(config, "no_rope_layer_interval", default=4))
    usual = [int((layer + 1) % interval != 0) for layer in range(read.num_layers)]
    flags = config.get("no_rope_layers") or usual
    if len(flags) != read.num_layers:
        raise CheckpointError(f"config.json: no_rope_layers has {len(flags)} entries for {read.num_layers} layers")
    ropes = tuple(rope if flag else None for rope, flag in zip(read.ropes, flags, strict=True))
    sliding = windows(config, read.num_layers) if config.get("use_sliding_window") else read.windows
    return replace(read, ropes=ropes, windows=sliding)


def _read_olmo2(config: Mapping[str, Any]) -> DecoderConfig:
    bias = bool(config.get("attention_bias", False))
    return llama_like(config, qk_norm="all", norm_inputs=False, norm_outputs=True, qkv_bias=bias, output_bias=bias)


def _read_granite(config: Mapping[str, Any]) -> DecoderConfig:
    return replace(
        _read_llama(config),
        attention_scale=float(number(config, "attention_multiplier", default=1.0)),
        embedding_scale=float(number(config, "embedding_multiplier", default=1.0)),
        residual_scale=float(number(config, "residual_multiplier", default=1.0)),
        logit_scale=1.0 / float(number(config, "logits_scaling", default=1.0)),
    )


def _read_starcoder2(config: Mapping[str, Any]) -> DecoderConfig:
    bias = bool(config.get("use_bias", True))
    return llama_like(
        {"tie_word_embeddings": True, **config},
        norm="layer",
        mlp="plain",
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        norm_epsilon=float(number(config, "norm_epsilon", default=1e-5)),
        windows=windows(config, int(number(config, "num_hidden_layers"))),
    )


def _read_stablelm(config: Mapping[str, Any]) -> DecoderConfig:
    refuse_unless(config, qk_layernorm=False)
    share = config.get("partial_rotary_factor", 0.25)
    return llama_like(
        {"partial_rotary_factor": share, **config},
        norm="layer",
        norm_epsilon=float(number(config, "layer_norm_eps", default=1e-5)),
        qkv_bias=bool(config.get("use_qkv_bias", False)),
        is_parallel=bool(config.get("use_parallel_residual", False)),
    )


def _stablelm_names(config: Mapping[str, Any]) -> Mapping[str, str]:
    """The parallel form has one norm for both branches."""
    return {
        role: name
        for role, name in LLAMA_NAMES.items()
        if role != "mlp_norm" or not config.get("use_parallel_residual", False)
    }


_BUFFERS = (r".*\.rotary_emb\.inv_freq",)

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(_read_llama, LLAMA_NAMES, ignored=_BUFFERS),
    "MistralForCausalLM": Family(_read_mistral, LLAMA_NAMES, ignored=_BUFFERS),
    "Qwen2ForCausalLM": Family(_read_qwen2, LLAMA_NAMES, ignored=_BUFFERS),
    "Qwen3ForCausalLM": Family(_read_qwen3, LLAMA_NAMES, ignored=_BUFFERS),
    "Qwen3MoeForCausalLM": Family(_read_qwen3_moe, _QWEN3_MOE_NAMES, ignored=_BUFFERS),
    "MixtralForCausalLM": Family(_read_mixtral, _MIXTRAL_NAMES, ignored=_BUFFERS),
    "Phi3ForCausalLM": Family(_read_mistral, _PHI3_NAMES, ignored=_BUFFERS),
    "SmolLM3ForCausalLM": Family(_read_smollm3, LLAMA_NAMES, ignored=_BUFFERS),
    "Olmo2ForCausalLM": Family(_read_olmo2, OUTPUT_NORM_NAMES, ignored=_BUFFERS),
    "GraniteForCausalLM": Family(_read_granite, LLAMA_NAMES, ignored=_BUFFERS),
    "Starcoder2ForCausalLM": Family(_read_starcoder2, _STARCODER2_NAMES, ignored=_BUFFERS),
    "StableLmForCausalLM": Family(_read_stablelm, _stablelm_names, ignored=_BUFFERS),
}
