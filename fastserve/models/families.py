"""The table of native families: Hugging Face architecture -> what its config means and what its tensors are called.

A family is one entry: a function from config.json to `DecoderConfig`, and names by role. A new family that is made of
known parts needs nothing else. What the parts cannot do is refused here by `CheckpointError`, with the reason; the
loader may then take transformers instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastserve.core.errors import CheckpointError
from fastserve.models.decoder import DecoderConfig
from fastserve.models.rope import Rope, read_rope

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the table.

    Attributes:
        read_config: config.json -> DecoderConfig; CheckpointError when our parts cannot run it.
        names: role -> module name on disk, {layer} standing for the layer's number.
        prefixes: beginnings that the names may have on disk; the first that fits is taken.
        transposed: roles whose weight is stored as [in, out].
        ignored: patterns of tensors that are no parameters.
    """

    read_config: Callable[[Mapping[str, Any]], DecoderConfig]
    names: Mapping[str, str]
    prefixes: tuple[str, ...] = ("",)
    transposed: frozenset[str] = field(default_factory=frozenset)
    ignored: tuple[str, ...] = ()


def number(config: Mapping[str, Any], *names: str, default: float | None = None) -> Any:
    """The first of these keys that is a number; CheckpointError when there is none and no default."""
    for name in names:
        value = config.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return value
    if default is None:
        raise CheckpointError(f"config.json lacks the number {names[0]}")
    return default


def activation(config: Mapping[str, Any], *names: str, default: str) -> str:
    """Our name of the config's activation."""
    name = next((config[key] for key in names if config.get(key)), default)
    if name not in ACTIVATIONS:
        raise CheckpointError(f"activation {name!r} is not known to the native modules")
    return ACTIVATIONS[name]


def windows(config: Mapping[str, Any], num_layers: int, first_layer: int = 0) -> tuple[int, ...]:
    """Sliding window per layer: by `layer_types` where the config has them, else from `first_layer` on."""
    window = int(config.get("sliding_window") or 0)
    if config.get("use_sliding_window") is False:
        window = 0
    types = config.get("layer_types")
    if not isinstance(types, list):
        return tuple(window if layer >= first_layer else 0 for layer in range(num_layers))
    strange = set(types) - {"full_attention", "sliding_attention"}
    if strange or len(types) != num_layers:
        raise CheckpointError(f"config.json: layer_types has {len(types)} entries of kinds {sorted(set(types))}")
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


def _llama_like(config: Mapping[str, Any], **differences: Any) -> DecoderConfig:
    """What Llama and its relatives share; `differences` are fields of DecoderConfig."""
    num_layers = int(number(config, "num_hidden_layers"))
    num_heads = int(number(config, "num_attention_heads"))
    hidden_size = int(number(config, "hidden_size"))
    head_size = int(number(config, "head_dim", default=hidden_size // num_heads))
    rope = read_rope(config, head_size)
    fields = dict(
        vocab_size=int(number(config, "vocab_size")),
        hidden_size=hidden_size,
        inner_size=int(number(config, "intermediate_size")),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=int(number(config, "num_key_value_heads", default=num_heads)),
        head_size=head_size,
        max_positions=max_positions(config, rope),
        windows=(0,) * num_layers,
        ropes=(rope,) * num_layers,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        norm_epsilon=float(number(config, "rms_norm_eps", default=1e-6)),
        activation=activation(config, "hidden_act", default="silu"),
    )
    return DecoderConfig(**{**fields, **differences})


def max_positions(config: Mapping[str, Any], rope: Rope) -> int:
    """Longest sequence; YaRN reaches factor times its original length, whatever max_position_embeddings says."""
    positions = int(number(config, "max_position_embeddings", default=2048))
    if rope.kind == "yarn":
        numbers = dict(rope.parameters)
        positions = max(positions, int(numbers["factor"] * numbers["original_max_position_embeddings"]))
    return positions


def _read_llama(config: Mapping[str, Any]) -> DecoderConfig:
    bias = bool(config.get("attention_bias", False))
    return _llama_like(config, qkv_bias=bias, output_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))


def _read_mistral(config: Mapping[str, Any]) -> DecoderConfig:
    return _llama_like(config, windows=windows(config, int(number(config, "num_hidden_layers"))))


def _read_qwen2(config: Mapping[str, Any]) -> DecoderConfig:
    return _llama_like(config, qkv_bias=True, windows=_qwen_windows(config))


def _read_qwen3(config: Mapping[str, Any]) -> DecoderConfig:
    bias = bool(config.get("attention_bias", False))
    head_size = int(number(config, "head_dim", default=128))
    return _llama_like(
        {**config, "head_dim": head_size},
        qk_norm=True,
        qkv_bias=bias,
        output_bias=bias,
        windows=_qwen_windows(config),
    )


def _qwen_windows(config: Mapping[str, Any]) -> tuple[int, ...]:
    num_layers = int(number(config, "num_hidden_layers"))
    if not config.get("use_sliding_window", False):
        return (0,) * num_layers
    return windows(config, num_layers, first_layer=int(number(config, "max_window_layers", default=28)))


def _read_gpt2(config: Mapping[str, Any]) -> DecoderConfig:
    for name, usual in (("scale_attn_by_inverse_layer_idx", False), ("scale_attn_weights", True)):
        if bool(config.get(name, usual)) is not usual:
            raise CheckpointError(f"{name}={config[name]} is not known to the native modules")
    if config.get("add_cross_attention"):
        raise CheckpointError("add_cross_attention is not known to the native modules")
    hidden_size, num_heads = int(number(config, "n_embd")), int(number(config, "n_head"))
    num_layers, num_positions = int(number(config, "n_layer")), int(number(config, "n_positions", "n_ctx"))
    return DecoderConfig(
        vocab_size=int(number(config, "vocab_size")),
        hidden_size=hidden_size,
        inner_size=int(number(config, "n_inner", default=4 * hidden_size)),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_size=hidden_size // num_heads,
        max_positions=num_positions,
        num_learned_positions=num_positions,
        windows=(0,) * num_layers,
        ropes=(None,) * num_layers,
        tied_embeddings=bool(config.get("tie_word_embeddings", True)),
        norm="layer",
        norm_epsilon=float(number(config, "layer_norm_epsilon", default=1e-5)),
        mlp="plain",
        activation=activation(config, "activation_function", default="gelu_new"),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
    )


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
GPT2_NAMES = {
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
_ROPE_BUFFERS = (r".*\.rotary_emb\.inv_freq",)

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(_read_llama, LLAMA_NAMES, ignored=_ROPE_BUFFERS),
    "MistralForCausalLM": Family(_read_mistral, LLAMA_NAMES, ignored=_ROPE_BUFFERS),
    "Qwen2ForCausalLM": Family(_read_qwen2, LLAMA_NAMES, ignored=_ROPE_BUFFERS),
    "Qwen3ForCausalLM": Family(_read_qwen3, LLAMA_NAMES, ignored=_ROPE_BUFFERS),
    "GPT2LMHeadModel": Family(
        _read_gpt2,
        GPT2_NAMES,
        prefixes=("transformer.", ""),
        transposed=frozenset({"query_key_value", "attention_output", "up", "down"}),
        ignored=(r".*\.attn\.(bias|masked_bias)",),
    ),
}
