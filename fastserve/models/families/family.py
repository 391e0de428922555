"""What a native family is, and how a config.json is read.

A family is one entry of the table: a function from config.json to `DecoderConfig`, and names by role. A new family
that is made of known parts needs nothing else. What the parts cannot do is refused by `CheckpointError`, with the
reason; the loader may then take transformers instead.
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
        names: role -> module name on disk, {layer} and {expert} standing for numbers; or a function from config.json
            to that.
        prefixes: beginnings that the names may have on disk; the first that fits is taken.
        transposed: roles whose weight is stored as [in, out].
        ignored: patterns of tensors that are no parameters.
    """

    read_config: Callable[[Mapping[str, Any]], DecoderConfig]
    names: Mapping[str, str] | Callable[[Mapping[str, Any]], Mapping[str, str]]
    prefixes: tuple[str, ...] = ("",)
    transposed: frozenset[str] = field(default_factory=frozenset)
    ignored: tuple[str, ...] = ()

    def names_of(self, config: Mapping[str, Any]) -> Mapping[str, str]:
        """The names for this config.json."""
        return self.names(config) if callable(self.names) else self.names


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


def llama_like(config: Mapping[str, Any], **differences: Any) -> DecoderConfig:
    """The config of Llama and its relatives; `differences` are fields of DecoderConfig."""
    num_layers = int(number(config, "num_hidden_layers"))
    num_heads, hidden_size = int(number(config, "num_attention_heads")), int(number(config, "hidden_size"))
    head_size = int(number(config, "head_dim", default=hidden_size // max(1, num_heads)))
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
    made = DecoderConfig(**{**fields, **differences})
    if min(num_heads, made.num_kv_heads) < 1 or num_heads % made.num_kv_heads:
        raise CheckpointError(f"config.json: {num_heads} heads cannot share {made.num_kv_heads} heads of keys evenly")
    return made


def max_positions(config: Mapping[str, Any], rope: Rope) -> int:
    """Longest sequence; YaRN reaches factor times its original length, whatever max_position_embeddings says.

    LongRoPE turns all positions differently when a sequence grows beyond its original length; keys that are cached or
    shared cannot follow, so sequences end there.
    """
    positions = int(number(config, "max_position_embeddings", default=2048))
    numbers = dict(rope.parameters)
    if rope.kind == "longrope":
        positions = min(positions, int(numbers["original_max_position_embeddings"]))
    if rope.kind == "yarn":
        positions = max(positions, int(numbers["factor"] * numbers["original_max_position_embeddings"]))
    return positions


def refuse_unless(config: Mapping[str, Any], **usual: Any) -> None:
    """CheckpointError when a key has another value than the one our parts compute; absent keys are the usual."""
    for name, value in usual.items():
        if config.get(name, value) not in (value, None):
            raise CheckpointError(f"{name}={config[name]} is not known to the native modules")
