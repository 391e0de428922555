"""One decoder for every native family: a config of numbers and choices, and a pass over the tokens of a step.

What differs between families is data (`DecoderConfig`, made in `families/`) or a class chosen by it (norm,
feed-forward); the pass itself has no branch per family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastserve.kernels.reference import Kernels
from fastserve.models.attention import AttentionContext
from fastserve.models.layers import MLPS, NORMS, Attention, AttentionShape, MlpShape, Rotation
from fastserve.models.model import ServingModel, same_fields
from fastserve.models.parameters import ParameterLoader
from fastserve.models.rope import Rope, RopeTable


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Everything that tells one decoder from another.

    Attributes:
        windows: per layer the sliding window in tokens, 0 for all.
        ropes: per layer its rotation, or None for a layer without one.
        num_learned_positions: rows of a learned position embedding; 0 without one.
        position_offset: row of the first position in it.
        norm, mlp: keys of `layers.NORMS` and `layers.MLPS`.
        norm_inputs, norm_outputs: norms before and after attention and feed-forward.
        is_parallel: x + attention(norm(x)) + mlp(norm(x)); with one norm where the family names no "mlp_norm".
        qk_norm: norms on queries and keys: "" none, "head" for each head, "all" over the heads together.
        qkv_groups: a merged query_key_value lies on disk as this many groups of (queries, keys, values).
        attention_scale: factor on the scores; 0 takes head_size ** -0.5.
        embedding_scale, residual_scale, logit_scale: factors on embeddings, branches and logits.
        logit_softcap: c > 0 replaces logits l by c * tanh(l / c).
        num_experts, num_active_experts: feed-forwards of a layer, and how many of them a token takes.
        experts_sum_to_one: the weights of a token's experts are scaled to a sum of one.
    """

    vocab_size: int
    hidden_size: int
    inner_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_positions: int
    windows: tuple[int, ...]
    ropes: tuple[Rope | None, ...]
    tied_embeddings: bool
    norm_epsilon: float
    activation: str
    num_learned_positions: int = 0
    position_offset: int = 0
    norm: str = "rms"
    norm_inputs: bool = True
    norm_outputs: bool = False
    is_parallel: bool = False
    mlp: str = "gated"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: str = ""
    qkv_groups: int = 1
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    num_experts: int = 0
    num_active_experts: int = 0
    experts_sum_to_one: bool = True

    def attention_shape(self) -> AttentionShape:
        scale = self.attention_scale or self.head_size**-0.5
        return AttentionShape(**same_fields(self, AttentionShape), scale=scale, softcap=self.attention_softcap)

    def mlp_shape(self) -> MlpShape:
        return MlpShape(**same_fields(self, MlpShape), bias=self.mlp_bias)


class DecoderLayer:
    """Attention and feed-forward, each added to its input: one after the other, or both to the same."""

    def __init__(self, parameters: ParameterLoader, config: DecoderConfig, layer: int) -> None:
        def norm(role: str, is_wanted: bool) -> Any:
            if not is_wanted:
                return None
            return NORMS[config.norm](parameters, role, config.hidden_size, config.norm_epsilon, layer)

        # In the order of the file.
        self._attention_norm = norm("attention_norm", config.norm_inputs)
        self._attention = Attention(parameters, config.attention_shape(), layer, config.windows[layer])
        self._attention_output_norm = norm("attention_output_norm", config.norm_outputs)
        self._mlp_norm = norm("mlp_norm", config.norm_inputs and parameters.has_role("mlp_norm"))
        self._mlp = MLPS[config.mlp](parameters, config.mlp_shape(), layer)
        self._mlp_output_norm = norm("mlp_output_norm", config.norm_outputs)
        self._is_parallel = config.is_parallel
        self._scale = config.residual_scale

    def __call__(
        self,
        x: Tensor,
        rotation: Rotation | None,
        positions: Tensor,
        context: AttentionContext,
        rows: Tensor | None = None,
    ) -> Tensor:
        """x [T, hidden] -> [T, hidden], or [R, hidden] of the tokens `rows`, whose attention sees all the same."""
        kernels = context.kernels
        normed = x if self._attention_norm is None else self._attention_norm(x, kernels)

        def wanted(part: Tensor) -> Tensor:
            return part if rows is None else kernels.embed(part, rows, part.dtype)

        def project(residual: Tensor | None) -> Tensor:
            return self._attention.project(attended, residual, kernels)

        attended, x = wanted(self._attention.attend(normed, rotation, positions, context)), wanted(x)
        if self._is_parallel:
            inner = wanted(normed) if self._mlp_norm is None else self._mlp_norm(x, kernels)
            return self._mlp(inner, project(x), kernels)
        x = self._add(x, project, self._attention_output_norm, kernels)
        inner = x if self._mlp_norm is None else self._mlp_norm(x, kernels)
        return self._add(x, lambda residual: self._mlp(inner, residual, kernels), self._mlp_output_norm, kernels)

    def _add(self, x: Tensor, branch: Callable[[Tensor | None], Tensor], norm: Any, kernels: Kernels) -> Tensor:
        """x + branch; the branch's last operation does it where nothing comes between."""
        if self._scale != 1.0:
            return x + branch(None) * self._scale
        return branch(x) if norm is None else norm(branch(None), kernels, x)


class Decoder(ServingModel):
    """Our own modules. Parameters are read while it is built."""

    def __init__(self, config: DecoderConfig, parameters: ParameterLoader) -> None:
        size = config.hidden_size
        self.device = parameters.device
        self.kernels = parameters.kernels
        self._dtype = parameters.dtype
        # The largest matrices first, so that their place in the file and in memory overlap while little else is loaded.
        self._embedding, self._head = parameters.embedding_and_head(
            config.vocab_size, size, config.tied_embeddings, config.head_bias
        )
        self._positions = None
        if config.num_learned_positions:
            rows = parameters.tensor("position_embedding", (config.num_learned_positions, size))
            self._positions = rows[config.position_offset :]
        self._layers = [DecoderLayer(parameters, config, layer) for layer in range(config.num_layers)]
        self._norm = NORMS[config.norm](parameters, "final_norm", size, config.norm_epsilon)
        self._config = config
        # In the compute precision, as the models were trained.
        self._embedding_scale = float(torch.tensor(config.embedding_scale, dtype=parameters.dtype))
        ropes = list(dict.fromkeys(rope for rope in config.ropes if rope is not None))
        self._tables = [RopeTable(rope, config.max_positions, parameters.device) for rope in ropes]
        # Which rotation a layer takes; the last one, after those of the tables, is none.
        self._rotation_of_layer = [len(ropes) if rope is None else ropes.index(rope) for rope in config.ropes]
        self.shape = parameters.shape(config, config.num_kv_heads)

    def reserve(self, num_positions: int) -> None:
        for table in self._tables:
            table.rotation(num_positions)

    @torch.inference_mode()
    def forward(
        self, input_ids: Tensor, positions: Tensor, context: AttentionContext, rows: Tensor | None = None
    ) -> Tensor:
        kernels = context.kernels
        x = kernels.embed(self._embedding, input_ids, self._dtype, scale=self._embedding_scale)
        if self._positions is not None:
            x = kernels.embed(self._positions, positions, self._dtype, residual=x)
        rotations = [*(table.rotation(context.longest) for table in self._tables), None]
        for layer, rotation in zip(self._layers, self._rotation_of_layer, strict=True):
            # Of other tokens the last layer leaves keys and values, and nothing else that anybody reads.
            wanted = rows if layer is self._layers[-1] else None
            x = layer(x, rotations[rotation], positions, context, wanted)
        return self._norm(x, kernels)

    def head(self, hidden: Tensor, kernels: Kernels) -> Tensor:
        return kernels.linear(self._head, hidden, is_wide=True)

    def finish(self, logits: Tensor) -> Tensor:
        """Scale and soft cap; neither changes which one is largest."""
        if self._config.logit_scale != 1.0:
            logits = logits * self._config.logit_scale
        cap = self._config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits
