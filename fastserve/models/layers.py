"""Parts of a transformer for serving: norms, attention, feed-forward. Plain objects over packed parameters.

No autograd, no padding, no cache: rows are the tokens of all sequences of the step, and attention goes through the
context. Everything is computed by the context's kernels, never by PyTorch directly and never depending on a step's
values, so that a network can be recorded as one plan (docs/decisions/0012). A part that ends in a linear adds the
residual there. Parts are put together in `decoder.py`. Legend: T tokens, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastserve.kernels.interface import HeadTransform, Kernels
from fastserve.models.attention import AttentionContext
from fastserve.models.parameters import ParameterLoader

Rotation = tuple[Tensor, Tensor]  # cos, sin [positions, R/2] float32


class RmsNorm:
    """x / rms(x) * weight."""

    def __init__(self, parameters: ParameterLoader, role: str, size: int, epsilon: float, layer: int = 0) -> None:
        self._weight = parameters.tensor(role, (size,), layer)
        self._epsilon = epsilon

    def __call__(self, x: Tensor, kernels: Kernels) -> Tensor:
        return kernels.rms_norm(x, self._weight, self._epsilon)


class LayerNorm:
    """(x - mean) / deviation * weight + bias."""

    def __init__(self, parameters: ParameterLoader, role: str, size: int, epsilon: float, layer: int = 0) -> None:
        self._weight = parameters.tensor(role, (size,), layer)
        self._bias = parameters.tensor(role, (size,), layer, "bias")
        self._epsilon = epsilon

    def __call__(self, x: Tensor, kernels: Kernels) -> Tensor:
        return kernels.layer_norm(x, self._weight, self._bias, self._epsilon)


NORMS: dict[str, Any] = {"rms": RmsNorm, "layer": LayerNorm}


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Sizes and options that all attention layers of a network share."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    scale: float
    softcap: float
    norm_epsilon: float


class Attention:
    """Merged q/k/v projection, optional norms on queries and keys, rotation, attention, output projection."""

    def __init__(self, parameters: ParameterLoader, shape: AttentionShape, layer: int, window: int) -> None:
        heads, kv_heads, size = shape.num_heads, shape.num_kv_heads, shape.head_size
        parts = {"query": heads * size, "key": kv_heads * size, "value": kv_heads * size}
        if parameters.has_role("query_key_value"):
            parts = {"query_key_value": (heads + 2 * kv_heads) * size}
        self._qkv = parameters.linear(parts, shape.hidden_size, shape.qkv_bias, layer)
        self._output = parameters.linear(
            {"attention_output": shape.hidden_size}, heads * size, shape.output_bias, layer
        )
        self._query_norm = self._key_norm = None
        if shape.qk_norm:
            self._query_norm = parameters.tensor("query_norm", (size,), layer)
            self._key_norm = parameters.tensor("key_norm", (size,), layer)
        self._norm_epsilon = shape.norm_epsilon
        self._layer = layer
        self._window = window
        self._scale = shape.scale
        self._softcap = shape.softcap
        self._heads = [heads, kv_heads, kv_heads]
        self._head_size = size

    def __call__(
        self, x: Tensor, residual: Tensor, rotation: Rotation | None, positions: Tensor, context: AttentionContext
    ) -> Tensor:
        """x [T, hidden] -> residual + attention(x), [T, hidden]."""
        kernels = context.kernels
        heads = kernels.linear(self._qkv, x).view(x.shape[0], -1, self._head_size)  # [T, H + 2G, D]
        query, key, value = heads.split(self._heads, dim=1)
        transform = None
        if rotation is not None or self._query_norm is not None:
            cos, sin = rotation or (None, None)
            transform = HeadTransform(self._query_norm, self._key_norm, self._norm_epsilon, cos, sin, positions)
        attended = context.attend(self._layer, query, key, value, self._scale, self._window, self._softcap, transform)
        return kernels.linear(self._output, attended.reshape(x.shape[0], -1), residual=residual)


class GatedMlp:
    """activation(gate(x)) * up(x), then down. Gate and up are one matrix."""

    def __init__(
        self, parameters: ParameterLoader, hidden_size: int, inner_size: int, activation: str, bias: bool, layer: int
    ) -> None:
        self._activation = activation
        parts = {"gate": inner_size, "up": inner_size}
        if parameters.has_role("gate_up"):
            parts = {"gate_up": 2 * inner_size}
        self._gate_up = parameters.linear(parts, hidden_size, bias, layer, is_gated=True)
        self._down = parameters.linear({"down": hidden_size}, inner_size, bias, layer)

    def __call__(self, x: Tensor, residual: Tensor, kernels: Kernels) -> Tensor:
        """x [T, hidden] -> residual + mlp(x), [T, hidden]."""
        return kernels.linear(self._down, kernels.linear(self._gate_up, x, self._activation), residual=residual)


class PlainMlp:
    """down(activation(up(x)))."""

    def __init__(
        self, parameters: ParameterLoader, hidden_size: int, inner_size: int, activation: str, bias: bool, layer: int
    ) -> None:
        self._activation = activation
        self._up = parameters.linear({"up": inner_size}, hidden_size, bias, layer)
        self._down = parameters.linear({"down": hidden_size}, inner_size, bias, layer)

    def __call__(self, x: Tensor, residual: Tensor, kernels: Kernels) -> Tensor:
        """x [T, hidden] -> residual + mlp(x), [T, hidden]."""
        return kernels.linear(self._down, kernels.linear(self._up, x, self._activation), residual=residual)


MLPS: dict[str, Any] = {"gated": GatedMlp, "plain": PlainMlp}
