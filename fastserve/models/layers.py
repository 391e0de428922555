"""Parts of a transformer for serving: norms, attention, feed-forward. Plain objects over packed parameters.

No autograd, no padding, no cache: rows are the tokens of all sequences of the step, and attention goes through the
context. Everything is computed by the context's kernels, never by PyTorch directly and never depending on a step's
values, so that a network can be recorded as one plan (docs/decisions/0012). A part that ends in a linear adds the
residual there. Parts are put together in `decoder.py` and `encoder.py`. Legend: T tokens, H query heads, G key/value
heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastserve.kernels.interface import HeadTransform, Scores
from fastserve.kernels.reference import Kernels
from fastserve.models.attention import AttentionContext
from fastserve.models.parameters import ParameterLoader

Rotation = tuple[Tensor, Tensor]  # cos, sin [positions, R/2] float32


class Norm:
    """x / rms(x) * (weight + offset), or centred: (x - mean) / deviation * weight + bias."""

    def __init__(
        self,
        parameters: ParameterLoader,
        role: str,
        size: int,
        epsilon: float,
        layer: int = 0,
        offset: float = 0.0,
        is_centred: bool = False,
        has_bias: bool = False,
    ) -> None:
        self.weight = parameters.tensor(role, (size,), layer)
        self.weight += offset
        self._bias = parameters.tensor(role, (size,), layer, "bias") if has_bias else None
        self._is_centred = is_centred
        self._epsilon = epsilon

    def __call__(self, x: Tensor, kernels: Kernels, residual: Tensor | None = None) -> Tensor:
        if self._is_centred:
            return kernels.layer_norm(x, self.weight, self._bias, self._epsilon, residual)
        return kernels.rms_norm(x, self.weight, self._epsilon, residual)


NORMS: dict[str, Any] = {
    "rms": Norm,
    "rms-plus-one": partial(Norm, offset=1.0),
    "layer": partial(Norm, is_centred=True, has_bias=True),
    "layer-no-bias": partial(Norm, is_centred=True),
}


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Sizes and options that all attention layers of a network share."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    qkv_bias: bool
    output_bias: bool
    qk_norm: str
    qkv_groups: int
    norm: str
    scale: float
    softcap: float
    norm_epsilon: float


class Attention:
    """Merged q/k/v projection, optional norms on queries and keys, rotation, attention, output projection."""

    def __init__(
        self, parameters: ParameterLoader, shape: AttentionShape, layer: int, window: int, bias: Tensor | None = None
    ) -> None:
        """window, bias: see `Scores`."""
        heads, kv_heads, size = shape.num_heads, shape.num_kv_heads, shape.head_size
        parts = {"query": heads * size, "key": kv_heads * size, "value": kv_heads * size}
        if parameters.has_role("query_key_value"):
            parts = {"query_key_value": (heads + 2 * kv_heads) * size}
        order = _merged_order(heads, kv_heads, size, shape.qkv_groups)
        self._qkv = parameters.linear(parts, shape.hidden_size, shape.qkv_bias, layer, order=order)
        self._output = parameters.linear(
            {"attention_output": shape.hidden_size}, heads * size, shape.output_bias, layer
        )
        self._query_norm: Any = None
        self._key_norm: Any = None
        if shape.qk_norm:
            counts = (1, 1) if shape.qk_norm == "head" else (heads, kv_heads)
            self._query_norm, self._key_norm = (
                NORMS[shape.norm](parameters, role, count * size, shape.norm_epsilon, layer)
                for role, count in zip(("query_norm", "key_norm"), counts, strict=True)
            )
        self._norms_heads_together = shape.qk_norm == "all"
        self._norm_epsilon = shape.norm_epsilon
        self._layer = layer
        self._scores = Scores(shape.scale, window, shape.softcap, bias)
        self._heads = [heads, kv_heads, kv_heads]
        self._head_size = size

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        rotation: Rotation | None,
        positions: Tensor,
        context: AttentionContext,
    ) -> Tensor:
        """x [T, hidden] -> attention(x) + residual, [T, hidden]."""
        return self.project(self.attend(x, rotation, positions, context), residual, context.kernels)

    def attend(self, x: Tensor, rotation: Rotation | None, positions: Tensor, context: AttentionContext) -> Tensor:
        """x [T, hidden] -> what each token's heads gathered, [T, H * D], for `project`."""
        kernels = context.kernels
        heads = kernels.linear(self._qkv, x).view(x.shape[0], -1, self._head_size)  # [T, H + 2G, D]
        query, key, value = heads.split(self._heads, dim=1)
        query_norm, key_norm = self._query_norm, self._key_norm
        if self._norms_heads_together:
            query = query_norm(query.flatten(1), kernels).view(query.shape)
            key = key_norm(key.flatten(1), kernels).view(key.shape)
            query_norm = key_norm = None
        transform = None
        if rotation is not None or query_norm is not None:
            cos, sin = rotation or (None, None)
            query_weight, key_weight = (None if norm is None else norm.weight for norm in (query_norm, key_norm))
            transform = HeadTransform(query_weight, key_weight, self._norm_epsilon, cos, sin, positions)
        return context.attend(self._layer, query, key, value, self._scores, transform).reshape(x.shape[0], -1)

    def project(self, attended: Tensor, residual: Tensor | None, kernels: Kernels) -> Tensor:
        """attended [T, H * D] -> [T, hidden], plus residual."""
        return kernels.linear(self._output, attended, residual=residual)


def _merged_order(heads: int, kv_heads: int, size: int, groups: int) -> Tensor | None:
    """Rows of a merged query_key_value that lies on disk group by group, as all queries, all keys, all values."""
    if groups == 1:
        return None
    rows = torch.arange((heads + 2 * kv_heads) * size).view(groups, -1, size)
    per_group = (heads // groups, kv_heads // groups, kv_heads // groups)
    return torch.cat([part.reshape(-1) for part in rows.split(per_group, dim=1)])


@dataclass(frozen=True, slots=True)
class MlpShape:
    """Sizes and options that all feed-forward layers of a network share."""

    hidden_size: int
    inner_size: int
    activation: str
    bias: bool
    num_experts: int
    num_active_experts: int
    experts_sum_to_one: bool


class Mlp:
    """down(activation(gate(x)) * up(x)), gate and up being one matrix; not gated: down(activation(up(x)))."""

    def __init__(self, parameters: ParameterLoader, shape: MlpShape, layer: int, is_gated: bool = True) -> None:
        self._activation = shape.activation
        parts = {"gate": shape.inner_size, "up": shape.inner_size} if is_gated else {"up": shape.inner_size}
        if parameters.has_role("gate_up"):
            parts = {"gate_up": 2 * shape.inner_size}
        self._inner = parameters.linear(parts, shape.hidden_size, shape.bias, layer, is_gated=is_gated)
        self._down = parameters.linear({"down": shape.hidden_size}, shape.inner_size, shape.bias, layer)

    def __call__(self, x: Tensor, residual: Tensor | None, kernels: Kernels) -> Tensor:
        """x [T, hidden] -> mlp(x) + residual, [T, hidden]."""
        return kernels.linear(self._down, kernels.linear(self._inner, x, self._activation), residual=residual)


class Experts:
    """A router gives each token its few best of many gated feed-forwards, weighted (Shazeer et al., 2017).

    Experts are computed in their order over the rows that chose them, so a row's sum never depends on other rows. Which
    ones depends on a step's values: such a network is not recorded.
    """

    def __init__(self, parameters: ParameterLoader, shape: MlpShape, layer: int) -> None:
        self._router = parameters.linear({"router": shape.num_experts}, shape.hidden_size, False, layer)
        self._experts = [Mlp(parameters.of_expert(expert), shape, layer) for expert in range(shape.num_experts)]
        self._num_active = min(shape.num_active_experts, shape.num_experts)
        self._sums_to_one = shape.experts_sum_to_one

    def __call__(self, x: Tensor, residual: Tensor | None, kernels: Kernels) -> Tensor:
        """x [T, hidden] -> mlp(x) + residual, [T, hidden]."""
        probs = torch.softmax(kernels.linear(self._router, x, is_wide=True), dim=-1)
        weights, chosen = torch.topk(probs, self._num_active, dim=-1)  # [T, active]
        if self._sums_to_one:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(x.dtype)
        output = torch.zeros_like(x)
        for expert in sorted(set(chosen.flatten().tolist())):
            rows, places = torch.where(chosen == expert)
            output[rows] += self._experts[expert](x[rows], None, kernels) * weights[rows, places, None]
        return output if residual is None else residual + output


MLPS: dict[str, Any] = {"gated": Mlp, "plain": partial(Mlp, is_gated=False), "experts": Experts}
