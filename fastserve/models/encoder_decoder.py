"""Encoder-decoders: an `Encoder`, and a decoder whose layers look at the encoder's output, too.

What the decoder reads of a source are keys and values per layer. They are computed once (`source_keys_values`) and lie
in blocks of the same cache as the decoder's own (`engine/sources.py`); a step then is the decoder alone. Families are
data (`families/encoder_decoders.py`). Legend: T tokens, S tokens of sources, K hidden size, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastserve.kernels.interface import PackedLinear, Scores
from fastserve.kernels.reference import Kernels
from fastserve.models.attention import AttentionContext, PagedContext
from fastserve.models.encoder import Encoder, EncoderConfig, RaggedBatch, distance_bias, position_table
from fastserve.models.layers import MLPS, NORMS, Attention
from fastserve.models.model import ServingModel
from fastserve.models.parameters import ParameterLoader


@dataclass(frozen=True, slots=True)
class EncoderDecoderConfig:
    """Two stacks, described alike, and what comes after the second.

    Attributes:
        logit_scale: factor on logits, which the last norm's weights take in advance; only where norms come first.
        has_logit_bias: the folder has a bias on logits.
        is_shared: both stacks have one embedding. is_tied: the decoder's is the output matrix, too.
    """

    encoder: EncoderConfig
    decoder: EncoderConfig
    logit_scale: float = 1.0
    has_logit_bias: bool = False
    is_shared: bool = True
    is_tied: bool = True


class SourceAttention:
    """Attention over a source: queries of the decoder's rows, keys and values of the encoder's."""

    def __init__(self, parameters: ParameterLoader, config: EncoderConfig, layer: int) -> None:
        size, inner = config.hidden_size, config.num_heads * config.head_size
        self._query = parameters.linear({"source_query": inner}, size, config.bias, layer)
        parts = {"source_key": inner, "source_value": inner}
        self._key_value = parameters.linear(parts, size, config.bias, layer)
        self._output = parameters.linear({"source_output": size}, inner, config.bias, layer)
        self._layer, self._head_size, self._scores = layer, config.head_size, Scores(config.attention_shape().scale)

    def __call__(self, x: Tensor, residual: Tensor, context: PagedContext) -> Tensor:
        """x [T, K] -> attention(x) + residual, [T, K]."""
        kernels = context.kernels
        query = kernels.linear(self._query, x).view(x.shape[0], -1, self._head_size)
        attended = context.attend_source(self._layer, query, self._scores)
        return kernels.linear(self._output, attended.reshape(x.shape[0], -1), residual=residual)

    def keys_values(self, encoded: Tensor, kernels: Kernels) -> tuple[Tensor, Tensor]:
        """The encoder's rows [S, K] -> keys and values [S, H, D]."""
        both = kernels.linear(self._key_value, encoded).view(encoded.shape[0], 2, -1, self._head_size)
        return both[:, 0], both[:, 1]


class DecoderLayer:
    """Attention, attention over the source, feed-forward: each added to its input, a norm before each or after."""

    def __init__(self, parameters: ParameterLoader, config: EncoderConfig, layer: int, bias: Tensor | None) -> None:
        def norm(role: str) -> Any:
            return NORMS[config.norm](parameters, role, config.hidden_size, config.norm_epsilon, layer)

        self._norms_first = config.norms_first
        self._attention_norm = norm("attention_norm")
        self._attention = Attention(parameters, config.attention_shape(), layer, window=0, bias=bias)
        self._source_norm = norm("source_norm")
        self.source = SourceAttention(parameters, config, layer)
        self._mlp_norm = norm("mlp_norm")
        self._mlp = MLPS[config.mlp](parameters, config.mlp_shape(), layer)

    def __call__(self, x: Tensor, positions: Tensor, context: PagedContext) -> Tensor:
        kernels = context.kernels
        if self._norms_first:
            x = self._attention(self._attention_norm(x, kernels), x, None, positions, context)
            x = self.source(self._source_norm(x, kernels), x, context)
            return self._mlp(self._mlp_norm(x, kernels), x, kernels)
        x = self._attention_norm(self._attention(x, x, None, positions, context), kernels)
        x = self._source_norm(self.source(x, x, context), kernels)
        return self._mlp_norm(self._mlp(x, x, kernels), kernels)


class EncoderDecoder(ServingModel):
    """A network whose sequences have a source. Parameters are read while it is built.

    Attributes:
        max_source, max_target: tokens of the longest source, and of the longest sequence of the decoder.
    """

    def __init__(self, config: EncoderDecoderConfig, encoder: ParameterLoader, decoder: ParameterLoader) -> None:
        stack, size = config.decoder, config.decoder.hidden_size
        self.device, self.kernels, self._dtype = decoder.device, decoder.kernels, decoder.dtype
        self._stack = stack
        bias = None
        if config.has_logit_bias:
            bias = decoder.tensor("logit_bias", (1, stack.vocab_size), suffix="")[0]
        embedding = decoder.linear(
            {"embedding": stack.vocab_size}, size, bias if config.is_tied and bias is not None else False
        )
        self._embedding: PackedLinear = embedding
        self._head = embedding
        if not config.is_tied:
            self._head = decoder.linear({"head": stack.vocab_size}, size, False if bias is None else bias)
        self._encoder = Encoder(config.encoder, encoder, embedding=embedding if config.is_shared else None)
        self._positions = position_table(stack, decoder, size)
        self._norm = self._final_norm = None
        if stack.embedding_norm:
            self._norm = NORMS[stack.norm](decoder, "embedding_norm", size, stack.norm_epsilon)
        if stack.norms_first:
            self._final_norm = NORMS[stack.norm](decoder, "final_norm", size, stack.norm_epsilon)
            self._final_norm.weight *= config.logit_scale
        bias = distance_bias(stack, decoder, is_causal=True)
        self._layers = [DecoderLayer(decoder, stack, layer, bias) for layer in range(stack.num_layers)]
        self.max_source, self.max_target = config.encoder.max_positions, stack.max_positions
        # Sequences of the decoder begin with their sources.
        positions = self.max_source + self.max_target
        self.shape = replace(decoder.shape(stack, stack.num_heads), max_positions=positions)

    @torch.inference_mode()
    def source_keys_values(self, batch: RaggedBatch) -> Iterator[tuple[Tensor, Tensor]]:
        """Per layer of the decoder, keys and values [S, H, D] of whole sources."""
        encoded = self._encoder.forward(batch)
        for layer in self._layers:
            yield layer.source.keys_values(encoded, self.kernels)

    @torch.inference_mode()
    def forward(
        self, input_ids: Tensor, positions: Tensor, context: AttentionContext, rows: Tensor | None = None
    ) -> Tensor:
        """input_ids and positions [T] int64 of the decoder -> hidden states after the last norm, [T, K] or [R, K]."""
        assert isinstance(context, PagedContext)
        kernels = context.kernels
        x = kernels.embed(self._embedding, input_ids, self._dtype, scale=self._stack.embedding_scale)
        if self._positions is not None:
            x = kernels.embed(self._positions, positions, self._dtype, residual=x)
        if self._norm is not None:
            x = self._norm(x, kernels)
        for layer in self._layers:
            x = layer(x, positions, context)
        if rows is not None:
            x = kernels.embed(x, rows, x.dtype)
        return x if self._final_norm is None else self._final_norm(x, kernels)

    def head(self, hidden: Tensor, kernels: Kernels) -> Tensor:
        return kernels.linear(self._head, hidden, is_wide=True)
