"""GPT-2 and what followed it: layer norms, biases, plain feed-forward; learned positions or partial rotation.

Several store queries, keys and values as one matrix whose rows go group by group (`DecoderConfig.qkv_groups`), and
several add attention and feed-forward of the same input to the residual (`is_parallel`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastserve.models.decoder import DecoderConfig
from fastserve.models.families.family import Family, activation, llama_like, number, refuse_unless

_GPT2_NAMES = {
    "embedding": "wte",
    "position_embedding": "wpe",
    "final_norm": "ln_f",
    "head": "lm_head",
    "attention_norm": "h.{layer}.ln_1",
    "query_key_value": "h.{layer}.attn.c_attn",
    "attention_output": "h.{layer}.attn.c_proj",
    "mlp_norm": "h.{layer}.ln_2",
    "up": "h.{layer}.mlp.c_fc",
    "down": "h.{layer}.mlp.c_proj",
}
_NEOX_NAMES = {
    "embedding": "embed_in",
    "final_norm": "final_layer_norm",
    "head": "embed_out",
    "attention_norm": "layers.{layer}.input_layernorm",
    "query_key_value": "layers.{layer}.attention.query_key_value",
    "attention_output": "layers.{layer}.attention.dense",
    "mlp_norm": "layers.{layer}.post_attention_layernorm",
    "up": "layers.{layer}.mlp.dense_h_to_4h",
    "down": "layers.{layer}.mlp.dense_4h_to_h",
}
_OPT_NAMES = {
    "embedding": "embed_tokens",
    "position_embedding": "embed_positions",
    "final_norm": "final_layer_norm",
    "head": "lm_head",
    "attention_norm": "layers.{layer}.self_attn_layer_norm",
    "query": "layers.{layer}.self_attn.q_proj",
    "key": "layers.{layer}.self_attn.k_proj",
    "value": "layers.{layer}.self_attn.v_proj",
    "attention_output": "layers.{layer}.self_attn.out_proj",
    "mlp_norm": "layers.{layer}.final_layer_norm",
    "up": "layers.{layer}.fc1",
    "down": "layers.{layer}.fc2",
}
_PHI_NAMES = {
    "embedding": "embed_tokens",
    "final_norm": "final_layernorm",
    "head": "lm_head",
    "attention_norm": "layers.{layer}.input_layernorm",
    "query": "layers.{layer}.self_attn.q_proj",
    "key": "layers.{layer}.self_attn.k_proj",
    "value": "layers.{layer}.self_attn.v_proj",
    "attention_output": "layers.{layer}.self_attn.dense",
    "up": "layers.{layer}.mlp.fc1",
    "down": "layers.{layer}.mlp.fc2",
}
_BIASES = dict(norm="layer", mlp="plain", qkv_bias=True, output_bias=True, mlp_bias=True)


def _read_gpt2(config: Mapping[str, Any], **differences: Any) -> DecoderConfig:
    refuse_unless(config, scale_attn_by_inverse_layer_idx=False, scale_attn_weights=True, add_cross_attention=False)
    hidden_size, num_layers = int(number(config, "n_embd")), int(number(config, "n_layer"))
    fields = dict(
        num_kv_heads=int(number(config, "n_head")),
        num_learned_positions=int(number(config, "n_positions", "n_ctx")),
        ropes=(None,) * num_layers,
        norm_epsilon=float(number(config, "layer_norm_epsilon", default=1e-5)),
        activation=activation(config, "activation_function", default="gelu_new"),
    )
    sizes = dict(
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=number(config, "n_head"),
        intermediate_size=number(config, "n_inner", default=4 * hidden_size),
        max_position_embeddings=number(config, "n_positions", "n_ctx"),
    )
    return llama_like({"tie_word_embeddings": True, **config, **sizes}, **{**fields, **_BIASES, **differences})


def _read_gpt_bigcode(config: Mapping[str, Any]) -> DecoderConfig:
    if config.get("multi_query", True):
        return _read_gpt2(config, num_kv_heads=1)
    return _read_gpt2(config, qkv_groups=int(number(config, "n_head")))


def _read_neox(config: Mapping[str, Any]) -> DecoderConfig:
    num_heads = int(number(config, "num_attention_heads"))
    older = {"partial_rotary_factor": config.get("rotary_pct", 0.25), "rope_theta": config.get("rotary_emb_base")}
    bias = bool(config.get("attention_bias", True))
    return llama_like(
        {**older, **config, "num_key_value_heads": num_heads},
        **{**_BIASES, "qkv_bias": bias, "output_bias": bias},
        norm_epsilon=float(number(config, "layer_norm_eps", default=1e-5)),
        activation=activation(config, "hidden_act", default="gelu"),
        is_parallel=bool(config.get("use_parallel_residual", True)),
        qkv_groups=num_heads,
    )


def _read_opt(config: Mapping[str, Any]) -> DecoderConfig:
    hidden_size = int(number(config, "hidden_size"))
    refuse_unless(
        config,
        do_layer_norm_before=True,
        _remove_final_layer_norm=False,
        layer_norm_elementwise_affine=True,
        word_embed_proj_dim=hidden_size,
    )
    num_layers, num_positions = int(number(config, "num_hidden_layers")), int(number(config, "max_position_embeddings"))
    bias = bool(config.get("enable_bias", True))
    return llama_like(
        {
            "tie_word_embeddings": True,
            **config,
            "intermediate_size": number(config, "ffn_dim"),
            "num_key_value_heads": number(config, "num_attention_heads"),
        },
        **{**_BIASES, "qkv_bias": bias, "output_bias": bias, "mlp_bias": bias},
        norm_epsilon=1e-5,
        activation=activation(config, "activation_function", default="relu"),
        ropes=(None,) * num_layers,
        num_learned_positions=num_positions + _OPT_POSITION_OFFSET,
        position_offset=_OPT_POSITION_OFFSET,
    )


_OPT_POSITION_OFFSET = 2  # rows that a padding token once took


def _read_falcon(config: Mapping[str, Any]) -> DecoderConfig:
    refuse_unless(config, alibi=False)
    num_heads, hidden_size = int(number(config, "num_attention_heads")), int(number(config, "hidden_size"))
    is_new = bool(config.get("new_decoder_architecture", False))
    if is_new:
        kv_heads = groups = int(number(config, "num_kv_heads", default=num_heads))
    elif config.get("multi_query", True):
        kv_heads = groups = 1
    else:
        kv_heads = groups = num_heads
    bias = bool(config.get("bias", False))
    return llama_like(
        {
            "tie_word_embeddings": True,
            **config,
            "num_key_value_heads": kv_heads,
            "intermediate_size": number(config, "ffn_hidden_size", default=4 * hidden_size),
        },
        **{**_BIASES, "qkv_bias": bias, "output_bias": bias, "mlp_bias": bias},
        norm_epsilon=float(number(config, "layer_norm_epsilon", default=1e-5)),
        activation=activation(config, "activation", default="gelu"),
        is_parallel=is_new or bool(config.get("parallel_attn", True)),
        qkv_groups=groups,
    )


def _falcon_names(config: Mapping[str, Any]) -> Mapping[str, str]:
    """One norm per layer, or one per branch, under three names."""
    layer = "h.{layer}."
    names = {
        "embedding": "word_embeddings",
        "final_norm": "ln_f",
        "head": "lm_head",
        "attention_norm": layer + "input_layernorm",
        "query_key_value": layer + "self_attention.query_key_value",
        "attention_output": layer + "self_attention.dense",
        "up": layer + "mlp.dense_h_to_4h",
        "down": layer + "mlp.dense_4h_to_h",
    }
    is_new = bool(config.get("new_decoder_architecture", False))
    if is_new and (config.get("num_ln_in_parallel_attn") or 2) == 2:
        return {**names, "attention_norm": layer + "ln_attn", "mlp_norm": layer + "ln_mlp"}
    if not is_new and not config.get("parallel_attn", True):
        return {**names, "mlp_norm": layer + "post_attention_layernorm"}
    return names


def _read_phi(config: Mapping[str, Any]) -> DecoderConfig:
    refuse_unless(config, qk_layernorm=False)
    return llama_like(
        {"partial_rotary_factor": 0.5, **config},
        **_BIASES,
        norm_epsilon=float(number(config, "layer_norm_eps", default=1e-5)),
        activation=activation(config, "hidden_act", default="gelu_new"),
        is_parallel=True,
        head_bias=True,
    )


_MASKS = (r".*\.attn\.(bias|masked_bias)", r".*\.attention\.(bias|masked_bias)", r".*rotary_emb\.inv_freq")

FAMILIES: dict[str, Family] = {
    "GPT2LMHeadModel": Family(
        _read_gpt2,
        _GPT2_NAMES,
        prefixes=("transformer.", ""),
        transposed=frozenset({"query_key_value", "attention_output", "up", "down"}),
        ignored=_MASKS,
    ),
    "GPTBigCodeForCausalLM": Family(_read_gpt_bigcode, _GPT2_NAMES, prefixes=("transformer.",), ignored=_MASKS),
    "GPTNeoXForCausalLM": Family(_read_neox, _NEOX_NAMES, prefixes=("gpt_neox.", ""), ignored=_MASKS),
    "OPTForCausalLM": Family(_read_opt, _OPT_NAMES, prefixes=("model.decoder.", "decoder."), ignored=_MASKS),
    "FalconForCausalLM": Family(_read_falcon, _falcon_names, prefixes=("transformer.",), ignored=_MASKS),
    "PhiForCausalLM": Family(_read_phi, _PHI_NAMES, prefixes=("model.",), ignored=_MASKS),
}
