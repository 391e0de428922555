"""One decoder for every native family: a config of numbers and choices, and a pass over the tokens of a step.

What differs between families is data (`DecoderConfig`, made in `families.py`) or a class chosen by it (norm,
feed-forward); the pass itself has no branch per family. Pre-norm layers: x += attention(norm(x)); x += mlp(norm(x)).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastserve.kernels.interface import Kernels
from fastserve.models.attention import AttentionContext
from fastserve.models.layers import MLPS, NORMS, Attention, AttentionShape, Rotation
from fastserve.models.model import ModelShape
from fastserve.models.parameters import ParameterLoader
from fastserve.models.rope import Rope, RopeTable


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Everything that tells one decoder from another.

    Attributes:
        windows: per layer the sliding window in tokens, 0 for all.
        ropes: per layer its rotation, or None for a layer without one.
        num_learned_positions: rows of a learned position embedding; 0 without one.
        norm, mlp: keys of `layers.NORMS` and `layers.MLPS`.
        attention_scale: factor on the scores; 0 takes head_size ** -0.5.
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
    norm: str = "rms"
    mlp: str = "gated"
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_scale: float = 0.0
    attention_softcap: float = 0.0

    def attention_shape(self) -> AttentionShape:
        return AttentionShape(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            hidden_size=self.hidden_size,
            qkv_bias=self.qkv_bias,
            output_bias=self.output_bias,
            qk_norm=self.qk_norm,
            scale=self.attention_scale or self.head_size**-0.5,
            softcap=self.attention_softcap,
            norm_epsilon=self.norm_epsilon,
        )


class DecoderLayer:
    """One pre-norm layer."""

    def __init__(self, parameters: ParameterLoader, config: DecoderConfig, layer: int) -> None:
        norm, mlp = NORMS[config.norm], MLPS[config.mlp]
        size, epsilon = config.hidden_size, config.norm_epsilon
        self._attention_norm = norm(parameters, "attention_norm", size, epsilon, layer)
        self._attention = Attention(parameters, config.attention_shape(), layer, config.windows[layer])
        self._mlp_norm = norm(parameters, "mlp_norm", size, epsilon, layer)
        self._mlp = mlp(parameters, size, config.inner_size, config.activation, config.mlp_bias, layer)

    def __call__(self, x: Tensor, rotation: Rotation | None, positions: Tensor, context: AttentionContext) -> Tensor:
        kernels = context.kernels
        x = self._attention(self._attention_norm(x, kernels), x, rotation, positions, context)
        return self._mlp(self._mlp_norm(x, kernels), x, kernels)


class Decoder:
    """A ServingModel over our own modules. Parameters are read while it is built."""

    has_own_cache = False

    def __init__(self, config: DecoderConfig, parameters: ParameterLoader) -> None:
        size = config.hidden_size
        self.device = parameters.device
        self._kernels = parameters.kernels
        self._dtype = parameters.dtype
        # The largest matrices first, so that their place in the file and in memory overlap while little else is loaded.
        self._embedding, self._head = parameters.embedding_and_head(config.vocab_size, size, config.tied_embeddings)
        self._positions = None
        if config.num_learned_positions:
            self._positions = parameters.tensor("position_embedding", (config.num_learned_positions, size))
        self._layers = [DecoderLayer(parameters, config, layer) for layer in range(config.num_layers)]
        self._norm = NORMS[config.norm](parameters, "final_norm", size, config.norm_epsilon)
        ropes = list(dict.fromkeys(rope for rope in config.ropes if rope is not None))
        self._tables = [RopeTable(rope, config.max_positions, parameters.device) for rope in ropes]
        # Which rotation a layer takes; the last one, after those of the tables, is none.
        self._rotation_of_layer = [len(ropes) if rope is None else ropes.index(rope) for rope in config.ropes]
        self.shape = _shape(config, parameters)

    @torch.inference_mode()
    def forward(self, input_ids: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        """input_ids and positions [T] int64 -> hidden states [T, hidden_size], after the last norm."""
        kernels = context.kernels
        x = kernels.embed(self._embedding, input_ids, self._dtype)
        if self._positions is not None:
            x = kernels.embed(self._positions, positions, self._dtype, residual=x)
        rotations = [*(table.rotation(context.longest) for table in self._tables), None]
        for layer, rotation in zip(self._layers, self._rotation_of_layer, strict=True):
            x = layer(x, rotations[rotation], positions, context)
        return self._norm(x, kernels)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, kernels: Kernels | None = None) -> Tensor:
        """hidden [R, hidden_size] -> logits [R, vocab_size] in float32."""
        return (kernels or self._kernels).linear(self._head, hidden, is_wide=True)

    def release(self, request_ids: list[str]) -> None:
        """Nothing is kept between steps."""


def _shape(config: DecoderConfig, parameters: ParameterLoader) -> ModelShape:
    return ModelShape(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=config.max_positions,
        dtype=parameters.dtype,
        windows=config.windows,
        num_parameters=parameters.num_parameters,
        weight_bytes=parameters.num_bytes,
    )
