"""The metadata of a GGUF file as a config.json, and its tensors' names as those of the Hugging Face layout.

Metadata are named by architecture, such as llama.block_count; meanings are those of llama.cpp's converter and loader.
What this module does not know is refused by name, never left out. It reads no tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastserve.core.errors import CheckpointError

_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTPUT_NORM_MODULES = {
    **_MODULES,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# Architecture in GGUF -> class and model_type of transformers.
_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
# Keys of config.json -> metadata, for the architectures that are also written (`compress/gguf_export.py`).
METADATA_KEYS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
}
# The largest of their families scale queries by the mean width of a head instead of by its real one.
_LAYERS_OF_LARGEST = {"gemma2": 46, "gemma3": 62}
Metadata = Mapping[str, Any]


def hugging_face_name(architecture: str, name: str) -> str:
    """`blk.0.attn_q.weight` -> `model.layers.0.self_attn.q_proj.weight`.

    Raises:
        CheckpointError: a tensor that this architecture does not have.
    """
    modules = _OUTPUT_NORM_MODULES if architecture in _LAYERS_OF_LARGEST else _MODULES
    module, _, suffix = name.rpartition(".")
    outer = _OUTER.get(module)
    if outer is not None:
        return f"{outer}.{suffix}"
    block, _, rest = module.partition(".")
    layer, _, role = rest.partition(".")
    if block != "blk" or not layer.isdigit() or role not in modules:
        raise CheckpointError(f"the GGUF file has a tensor {name}, which is not known for {architecture}")
    return f"model.layers.{layer}.{modules[role]}.{suffix}"


def gguf_name(architecture: str, name: str) -> str:
    """The inverse of `hugging_face_name`.

    Raises:
        CheckpointError: a tensor that this architecture does not have.
    """
    modules = _OUTPUT_NORM_MODULES if architecture in _LAYERS_OF_LARGEST else _MODULES
    module, _, suffix = name.rpartition(".")
    for short, long in _OUTER.items():
        if module == long:
            return f"{short}.{suffix}"
    layer, _, rest = module.removeprefix("model.layers.").partition(".")
    for short, long in modules.items():
        if rest == long and module.startswith("model.layers."):
            return f"blk.{layer}.{short}.{suffix}"
    raise CheckpointError(f"the folder has a tensor {name}, for which GGUF has no name in {architecture}")


def make_config(metadata: Metadata, shapes: Mapping[str, tuple[int, ...]], frequency_factors: list[float]) -> Metadata:
    """A config.json for the file.

    Args:
        shapes: tensor name -> shape, rows first.
        frequency_factors: the tensor rope_freqs.weight, by which frequencies are divided; [] without it.

    Raises:
        CheckpointError: an architecture that is not known here, or metadata are missing.
    """
    name = str(metadata.get("general.architecture"))
    if name not in _ARCHITECTURES or metadata.get(f"{name}.expert_count"):
        known = ", ".join(_ARCHITECTURES)
        experts = " with experts" if name in _ARCHITECTURES else ""
        raise CheckpointError(
            f"GGUF files of architecture {name!r}{experts} are not read (known: {known}); give the folder of the "
            "model that the file was made from"
        )
    read = _Reader(metadata, name)
    architecture, model_type = _ARCHITECTURES[name]
    num_heads = read("attention.head_count")
    head_size = read("attention.key_length", read("embedding_length") // num_heads)
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": read("embedding_length"),
        "intermediate_size": read("feed_forward_length"),
        "num_hidden_layers": read("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": read("attention.head_count_kv", num_heads),
        "head_dim": head_size,
        "max_position_embeddings": read("context_length"),
        "rms_norm_eps": read("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in shapes,
        "rope_parameters": _rope(read, frequency_factors, 1e6 if name == "gemma3" else 10000.0),
        "hidden_act": "silu",
    }
    if name == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
        if read("attention.sliding_window", 0):
            config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
            config["sliding_window"] = read("attention.sliding_window")
    if name.startswith("gemma"):
        config |= _gemma(read, name, head_size, config)
    return config


def _gemma(read: _Reader, name: str, head_size: int, config: Metadata) -> dict[str, Any]:
    is_largest = config["num_hidden_layers"] == _LAYERS_OF_LARGEST[name]
    fields: dict[str, Any] = {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if is_largest else head_size,
        "sliding_window": read("attention.sliding_window"),
        "attn_logit_softcapping": read("attn_logit_softcapping", None),
        "final_logit_softcapping": read("final_logit_softcapping", None),
    }
    if name == "gemma3":
        local = {"rope_type": "default", "rope_theta": read("rope.freq_base_swa", 10000.0)}
        fields["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}
    return fields


def _rope(read: _Reader, factors: list[float], theta: float) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": read("rope.freq_base", theta)}
    kind = read("rope.scaling.type", "none")
    if factors:
        # What was llama3 in the model's own config; explicit factors are the same for every length.
        original = {"original_max_position_embeddings": read("context_length"), "attention_factor": 1.0, "factor": 1.0}
        return {**rope, "rope_type": "longrope", "short_factor": factors, "long_factor": factors, **original}
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"GGUF: rope scaling of type {kind!r} is not known (known: linear, yarn)")
    rope |= {"rope_type": kind, "factor": read("rope.scaling.factor")}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = read("rope.scaling.original_context_length")
    return rope


class _Reader:
    """Metadata of one architecture by their short names; CheckpointError where one is missing and has no default."""

    def __init__(self, metadata: Metadata, architecture: str) -> None:
        self._metadata = metadata
        self._architecture = architecture

    def __call__(self, name: str, *default: Any) -> Any:
        key = f"{self._architecture}.{name}"
        if key in self._metadata:
            return self._metadata[key]
        if not default:
            raise CheckpointError(f"the GGUF file lacks {key}; it was written by an old or a broken converter")
        return default[0]
