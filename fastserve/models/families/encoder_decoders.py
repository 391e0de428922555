"""The table of native encoder-decoders: class name -> two stacks of `EncoderConfig`, and the names of their parts.

A family of known parts is one entry: a function from config.json to `EncoderDecoderConfig` and the names of a layer in
either stack. Names of the encoder's and the decoder's modules differ by "{side}" alone, where they have the same role.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastserve.core.errors import CheckpointError
from fastserve.models.encoder import EncoderConfig
from fastserve.models.encoder_decoder import EncoderDecoderConfig
from fastserve.models.families.family import activation, number

_T5_LONGEST = 2048  # T5 has no positions of its own; Flan-T5 was trained on sources this long
_T5_ATTENTION = {"query": "q", "key": "k", "value": "v", "attention_output": "o"}
_T5_MLP = {"up": "wi", "gate": "wi_0", "down": "wo"}
_BART_NAMES = {
    "embedding_norm": "layernorm_embedding",
    "position_embedding": "embed_positions",
    "final_norm": "layer_norm",
    "query": "layers.{layer}.self_attn.q_proj",
    "key": "layers.{layer}.self_attn.k_proj",
    "value": "layers.{layer}.self_attn.v_proj",
    "attention_output": "layers.{layer}.self_attn.out_proj",
    "attention_norm": "layers.{layer}.self_attn_layer_norm",
    "up": "layers.{layer}.fc1",
    "down": "layers.{layer}.fc2",
    "mlp_norm": "layers.{layer}.final_layer_norm",
}
_BART_SOURCE = {
    "source_query": "layers.{layer}.encoder_attn.q_proj",
    "source_key": "layers.{layer}.encoder_attn.k_proj",
    "source_value": "layers.{layer}.encoder_attn.v_proj",
    "source_output": "layers.{layer}.encoder_attn.out_proj",
    "source_norm": "layers.{layer}.encoder_attn_layer_norm",
}


@dataclass(frozen=True, slots=True)
class EncoderDecoderFamily:
    """One row of the table.

    Attributes:
        read_config: config.json -> both stacks; CheckpointError when our parts cannot run it.
        names: (side, config.json) -> role -> name of a module, without the prefix.
        prefix: what names begin with, but for head and logit bias.
        ignored: patterns of tensors that are not needed.
    """

    read_config: Callable[[Mapping[str, Any]], EncoderDecoderConfig]
    names: Callable[[str, Mapping[str, Any]], dict[str, str]]
    prefix: str
    ignored: tuple[str, ...] = (r".*\.embed_positions\.weights?", r".*embed_tokens\.weight", r".*\.version")


def _t5_names(side: str, config: Mapping[str, Any]) -> dict[str, str]:
    block = f"{side}.block.{{layer}}.layer."
    mlp = f"{block}{1 if side == 'encoder' else 2}"
    is_gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
    names = {role: f"{block}0.SelfAttention.{part}" for role, part in _T5_ATTENTION.items()}
    names |= {role: f"{mlp}.DenseReluDense.{part}" for role, part in _T5_MLP.items()}
    names |= {"up": f"{mlp}.DenseReluDense.wi_1"} if is_gated else {}
    names |= {"attention_norm": f"{block}0.layer_norm", "mlp_norm": f"{mlp}.layer_norm"}
    names |= {"final_norm": f"{side}.final_layer_norm"}
    names |= {"relative_bias": f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias"}
    if side == "decoder":
        parts = (("source_query", "q"), ("source_key", "k"), ("source_value", "v"), ("source_output", "o"))
        names |= {role: f"{block}1.EncDecAttention.{part}" for role, part in parts}
        names |= {"source_norm": f"{block}1.layer_norm"}
    return names


def _bart_names(side: str, config: Mapping[str, Any]) -> dict[str, str]:
    parts = {**_BART_NAMES, **(_BART_SOURCE if side == "decoder" else {})}
    return {role: f"{side}.{name}" for role, name in parts.items()}


def _read_t5(config: Mapping[str, Any], always_scales: bool = True) -> EncoderDecoderConfig:
    name = str(config.get("feed_forward_proj", "relu"))
    kind = name.removeprefix("gated-")
    if name == "gated-gelu":
        kind = "gelu_new"
    size = int(number(config, "d_model"))
    longest = max(_T5_LONGEST, int(number(config, "n_positions", default=0)))

    def stack(num_layers: int) -> EncoderConfig:
        return EncoderConfig(
            vocab_size=int(number(config, "vocab_size")),
            hidden_size=size,
            inner_size=int(number(config, "d_ff")),
            num_layers=num_layers,
            num_heads=int(number(config, "num_heads")),
            head_size=int(number(config, "d_kv")),
            max_positions=longest,
            norm_epsilon=float(number(config, "layer_norm_epsilon", default=1e-6)),
            activation=activation({"": kind}, "", default=kind),
            layer_of=tuple(range(num_layers)),
            windows=(0,) * num_layers,
            ropes=(None,) * num_layers,
            norm="rms",
            norms_first=True,
            embedding_norm=False,
            mlp="gated" if name.startswith("gated") else "plain",
            bias=False,
            mlp_bias=False,
            num_buckets=int(number(config, "relative_attention_num_buckets", default=32)),
            max_distance=int(number(config, "relative_attention_max_distance", default=128)),
            attention_scale=1.0,
        )

    num_layers = int(number(config, "num_layers"))
    is_scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False)
    return EncoderDecoderConfig(
        encoder=stack(num_layers),
        decoder=stack(int(number(config, "num_decoder_layers", default=num_layers))),
        logit_scale=size**-0.5 if is_scaled and always_scales else 1.0,
    )


def _read_mt5(config: Mapping[str, Any]) -> EncoderDecoderConfig:
    return _read_t5({"feed_forward_proj": "gated-gelu", **config}, always_scales=False)


def _read_bart(config: Mapping[str, Any], **differences: Any) -> EncoderDecoderConfig:
    """BART's; `differences` are fields of both stacks."""
    size = int(number(config, "d_model"))
    positions = int(number(config, "max_position_embeddings"))

    def stack(side: str, vocab_size: int) -> EncoderConfig:
        num_layers, num_heads = (int(number(config, f"{side}_{key}")) for key in ("layers", "attention_heads"))
        if num_heads < 1 or size % num_heads:
            raise CheckpointError(f"d_model {size} is no multiple of {num_heads} attention heads")
        fields = dict(
            vocab_size=vocab_size,
            hidden_size=size,
            inner_size=int(number(config, f"{side}_ffn_dim")),
            num_layers=num_layers,
            num_heads=num_heads,
            head_size=size // num_heads,
            max_positions=positions,
            num_learned_positions=0 if "sinusoids" in differences else positions + 2,
            position_offset=0 if "sinusoids" in differences else 2,  # rows that a padding token once took
            norm_epsilon=1e-5,
            activation=activation(config, "activation_function", default="gelu"),
            layer_of=tuple(range(num_layers)),
            windows=(0,) * num_layers,
            ropes=(None,) * num_layers,
            embedding_scale=size**0.5 if config.get("scale_embedding") else 1.0,
        )
        return EncoderConfig(**{**fields, **differences})

    vocab_size = int(number(config, "vocab_size"))
    return EncoderDecoderConfig(
        encoder=stack("encoder", vocab_size),
        decoder=stack("decoder", int(number(config, "decoder_vocab_size", default=vocab_size))),
    )


def _read_marian(config: Mapping[str, Any]) -> EncoderDecoderConfig:
    return _read_bart(config, sinusoids="paper", embedding_norm=False)


def _read_pegasus(config: Mapping[str, Any]) -> EncoderDecoderConfig:
    return _read_bart(config, sinusoids="paper", embedding_norm=False, norms_first=True)


def _read_m2m(config: Mapping[str, Any]) -> EncoderDecoderConfig:
    offset = int(number(config, "pad_token_id", default=1)) + 1
    return _read_bart(
        {"activation_function": "relu", "scale_embedding": True, **config},
        sinusoids="tensor2tensor",
        position_offset=offset,
        embedding_norm=False,
        norms_first=True,
    )


def _read_mbart(config: Mapping[str, Any]) -> EncoderDecoderConfig:
    return _read_bart(config, norms_first=True)


ENCODER_DECODERS: dict[str, EncoderDecoderFamily] = {
    "T5ForConditionalGeneration": EncoderDecoderFamily(_read_t5, _t5_names, ""),
    "MT5ForConditionalGeneration": EncoderDecoderFamily(_read_mt5, _t5_names, ""),
    "BartForConditionalGeneration": EncoderDecoderFamily(_read_bart, _bart_names, "model."),
    "MBartForConditionalGeneration": EncoderDecoderFamily(_read_mbart, _bart_names, "model."),
    "MarianMTModel": EncoderDecoderFamily(_read_marian, _bart_names, "model."),
    "M2M100ForConditionalGeneration": EncoderDecoderFamily(_read_m2m, _bart_names, "model."),
    "PegasusForConditionalGeneration": EncoderDecoderFamily(_read_pegasus, _bart_names, "model."),
}
