"""The step "window": attention that sees the last tokens alone, so that its cache and its cost stop growing.

Nothing is computed: the weights stay, config.json says how far layers look. What is lost by it a "distill" step after
it mends. Llama becomes Mistral, which is the same network with a window; Qwen has windows of its own, layer by layer.
"""

from __future__ import annotations

from typing import Any

from fastserve.compress.folder_writer import FolderWriter
from fastserve.compress.network import Network
from fastserve.compress.prune import write_layers
from fastserve.compress.recipe import Window
from fastserve.core.errors import ConfigError

_AS_A_WHOLE = ("LlamaForCausalLM", "MistralForCausalLM")
_BY_LAYER = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")


def check(network: Network, step: Window) -> None:
    """ConfigError for networks that no architecture has with a window."""
    name, config = network.folder.architecture, network.folder.config
    if name not in _AS_A_WHOLE + _BY_LAYER:
        raise ConfigError(f"{name} has no form with a window; {', '.join(_AS_A_WHOLE + _BY_LAYER)} have one")
    if name in _AS_A_WHOLE and step.full_every:
        raise ConfigError(f"all layers of {name} look equally far; leave out full_every")
    if name in _AS_A_WHOLE and (config.get("attention_bias") or config.get("mlp_bias")):
        raise ConfigError(f"this {name} has biases, which no architecture has with a window")


def run(network: Network, step: Window, writer: FolderWriter) -> dict[str, Any]:
    """Write the tensors as they are; returns what changes in config.json."""
    count = len(network.blocks)
    write_layers(network, list(range(count)), writer)
    if network.folder.architecture in _AS_A_WHOLE:
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": step.size}
    kinds = [
        "full_attention" if step.full_every and (number + 1) % step.full_every == 0 else "sliding_attention"
        for number in range(count)
    ]
    changes = {"use_sliding_window": True, "sliding_window": step.size, "max_window_layers": 0}
    return {**changes, "layer_types": kinds}
