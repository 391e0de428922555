"""Models of known shapes without their weights: configuration and tensor list of each, as Hugging Face writes them.

A benchmark needs the right amount of work, not the right words, so `random_model.py` fills these shapes with seeded
random numbers. Plain data: imports nothing heavy. Sizes are those of the published models, except llama-0.1b, which
is ours (small enough for policy comparisons).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from fastserve.core.errors import ConfigError

# "matrix" is filled with normal numbers; "sinusoid" with the fixed position code of Vaswani et al. (2017), halves.
Fill = Literal["matrix", "ones", "zeros", "sinusoid"]
Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, shape and contents of one tensor."""

    name: str
    shape: tuple[int, ...]
    fill: Fill = "matrix"


@dataclass(frozen=True, slots=True)
class Shape:
    """One model: its `config.json` and the tensors that go with it."""

    name: str
    config: Config
    tensors: tuple[TensorSpec, ...]

    @property
    def num_parameters(self) -> int:
        total = 0
        for tensor in self.tensors:
            count = 1
            for size in tensor.shape:
                count *= size
            total += count
        return total


def names() -> list[str]:
    """The shapes there are."""
    return list(_SHAPES)


def shape(name: str) -> Shape:
    """The shape called `name`.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in _SHAPES:
        raise ConfigError(f"no shape {name!r}; there are: {', '.join(_SHAPES)}")
    config, list_tensors = _SHAPES[name]
    return Shape(name, {**_COMMON, **config}, tuple(list_tensors(config)))


def decoder_shape(config: Config) -> Shape:
    """A Llama- or Qwen3-like shape of any size, for tests."""
    return Shape("custom", {**_COMMON, **config}, tuple(_decoder(config)))


def _linear(name: str, outputs: int, inputs: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", (outputs, inputs))
    yield TensorSpec(f"{name}.bias", (outputs,), "zeros")


def _layer_norm(name: str, size: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", (size,), "ones")
    yield TensorSpec(f"{name}.bias", (size,), "zeros")


def _decoder(config: Config) -> Iterator[TensorSpec]:
    hidden, feed_forward = config["hidden_size"], config["intermediate_size"]
    head_size = config["head_dim"]
    query, key = config["num_attention_heads"] * head_size, config["num_key_value_heads"] * head_size
    yield TensorSpec("model.embed_tokens.weight", (config["vocab_size"], hidden))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield TensorSpec(f"{prefix}.input_layernorm.weight", (hidden,), "ones")
        yield TensorSpec(f"{prefix}.self_attn.q_proj.weight", (query, hidden))
        yield TensorSpec(f"{prefix}.self_attn.k_proj.weight", (key, hidden))
        yield TensorSpec(f"{prefix}.self_attn.v_proj.weight", (key, hidden))
        yield TensorSpec(f"{prefix}.self_attn.o_proj.weight", (hidden, query))
        if config["model_type"] == "qwen3":
            yield TensorSpec(f"{prefix}.self_attn.q_norm.weight", (head_size,), "ones")
            yield TensorSpec(f"{prefix}.self_attn.k_norm.weight", (head_size,), "ones")
        yield TensorSpec(f"{prefix}.post_attention_layernorm.weight", (hidden,), "ones")
        yield TensorSpec(f"{prefix}.mlp.gate_proj.weight", (feed_forward, hidden))
        yield TensorSpec(f"{prefix}.mlp.up_proj.weight", (feed_forward, hidden))
        yield TensorSpec(f"{prefix}.mlp.down_proj.weight", (hidden, feed_forward))
    yield TensorSpec("model.norm.weight", (hidden,), "ones")
    if not config["tie_word_embeddings"]:
        yield TensorSpec("lm_head.weight", (config["vocab_size"], hidden))


def _bert(config: Config) -> Iterator[TensorSpec]:
    hidden, feed_forward = config["hidden_size"], config["intermediate_size"]
    yield TensorSpec("embeddings.word_embeddings.weight", (config["vocab_size"], hidden))
    yield TensorSpec("embeddings.position_embeddings.weight", (config["max_position_embeddings"], hidden))
    yield TensorSpec("embeddings.token_type_embeddings.weight", (config["type_vocab_size"], hidden))
    yield from _layer_norm("embeddings.LayerNorm", hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            yield from _linear(f"{prefix}.attention.self.{part}", hidden, hidden)
        yield from _linear(f"{prefix}.attention.output.dense", hidden, hidden)
        yield from _layer_norm(f"{prefix}.attention.output.LayerNorm", hidden)
        yield from _linear(f"{prefix}.intermediate.dense", feed_forward, hidden)
        yield from _linear(f"{prefix}.output.dense", hidden, feed_forward)
        yield from _layer_norm(f"{prefix}.output.LayerNorm", hidden)
    yield from _linear("pooler.dense", hidden, hidden)


def _t5(config: Config) -> Iterator[TensorSpec]:
    hidden, inner, feed_forward = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]
    yield TensorSpec("shared.weight", (config["vocab_size"], hidden))
    for side, attentions in (("encoder", ["SelfAttention"]), ("decoder", ["SelfAttention", "EncDecAttention"])):
        for block in range(config["num_layers"]):
            prefix = f"{side}.block.{block}.layer"
            for index, attention in enumerate(attentions):
                for part in "qkv":
                    yield TensorSpec(f"{prefix}.{index}.{attention}.{part}.weight", (inner, hidden))
                yield TensorSpec(f"{prefix}.{index}.{attention}.o.weight", (hidden, inner))
                if block == 0 and index == 0:
                    buckets = (config["relative_attention_num_buckets"], config["num_heads"])
                    yield TensorSpec(f"{prefix}.0.SelfAttention.relative_attention_bias.weight", buckets)
                yield TensorSpec(f"{prefix}.{index}.layer_norm.weight", (hidden,), "ones")
            last = f"{prefix}.{len(attentions)}"
            yield TensorSpec(f"{last}.DenseReluDense.wi.weight", (feed_forward, hidden))
            yield TensorSpec(f"{last}.DenseReluDense.wo.weight", (hidden, feed_forward))
            yield TensorSpec(f"{last}.layer_norm.weight", (hidden,), "ones")
        yield TensorSpec(f"{side}.final_layer_norm.weight", (hidden,), "ones")


def _bart_like(config: Config) -> Iterator[TensorSpec]:
    """BART and Marian: the same layers; Marian has fixed positions and no norm after the embedding."""
    hidden, vocab = config["d_model"], config["vocab_size"]
    is_marian = config["model_type"] == "marian"
    positions = config["max_position_embeddings"] + (0 if is_marian else 2)  # BART keeps two spare rows
    yield TensorSpec("final_logits_bias", (1, vocab), "zeros")
    yield TensorSpec("model.shared.weight", (vocab, hidden))
    for side, attentions in (("encoder", ["self_attn"]), ("decoder", ["self_attn", "encoder_attn"])):
        prefix = f"model.{side}"
        yield TensorSpec(f"{prefix}.embed_positions.weight", (positions, hidden), "sinusoid" if is_marian else "matrix")
        if not is_marian:
            yield from _layer_norm(f"{prefix}.layernorm_embedding", hidden)
        for layer in range(config[f"{side}_layers"]):
            for attention in attentions:
                for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
                    yield from _linear(f"{prefix}.layers.{layer}.{attention}.{part}", hidden, hidden)
                yield from _layer_norm(f"{prefix}.layers.{layer}.{attention}_layer_norm", hidden)
            yield from _linear(f"{prefix}.layers.{layer}.fc1", config[f"{side}_ffn_dim"], hidden)
            yield from _linear(f"{prefix}.layers.{layer}.fc2", hidden, config[f"{side}_ffn_dim"])
            yield from _layer_norm(f"{prefix}.layers.{layer}.final_layer_norm", hidden)


_COMMON: Config = {"dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
_DECODER: Config = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "initializer_range": 0.02, "attention_bias": False}
_TWO_SIDED: Config = {"is_encoder_decoder": True, "decoder_start_token_id": 0, "tie_word_embeddings": True}

_SHAPES: dict[str, tuple[Config, Callable[[Config], Iterator[TensorSpec]]]] = {
    "qwen3-0.6b": (
        _DECODER
        | {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 4096,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
        },
        _decoder,
    ),
    "llama-0.1b": (
        _DECODER
        | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 32000,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "max_position_embeddings": 4096,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
        },
        _decoder,
    ),
    "llama-8b": (
        _DECODER
        | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 8192,
            "rope_theta": 500000.0,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
        _decoder,
    ),
    "bert-base": (
        {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "vocab_size": 30522,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
        },
        _bert,
    ),
    "t5-base": (
        _TWO_SIDED
        | {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": "t5",
            "vocab_size": 32128,
            "d_model": 768,
            "d_kv": 64,
            "d_ff": 3072,
            "num_layers": 12,
            "num_decoder_layers": 12,
            "num_heads": 12,
            "relative_attention_num_buckets": 32,
            "relative_attention_max_distance": 128,
            "feed_forward_proj": "relu",
            "layer_norm_epsilon": 1e-6,
        },
        _t5,
    ),
    "marian": (
        _TWO_SIDED
        | {
            "architectures": ["MarianMTModel"],
            "model_type": "marian",
            "vocab_size": 58101,
            "d_model": 512,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "encoder_attention_heads": 8,
            "decoder_attention_heads": 8,
            "encoder_ffn_dim": 2048,
            "decoder_ffn_dim": 2048,
            "max_position_embeddings": 512,
            "activation_function": "swish",
            "scale_embedding": True,
            "share_encoder_decoder_embeddings": True,
            "forced_eos_token_id": 2,
        },
        _bart_like,
    ),
    "bart-base": (
        _TWO_SIDED
        | {
            "architectures": ["BartForConditionalGeneration"],
            "model_type": "bart",
            "vocab_size": 50265,
            "d_model": 768,
            "encoder_layers": 6,
            "decoder_layers": 6,
            "encoder_attention_heads": 12,
            "decoder_attention_heads": 12,
            "encoder_ffn_dim": 3072,
            "decoder_ffn_dim": 3072,
            "max_position_embeddings": 1024,
            "activation_function": "gelu",
            "scale_embedding": False,
            "forced_eos_token_id": 2,
        },
        _bart_like,
    ),
}
