"""One bidirectional encoder for every native family, and the heads on top: padding-free, no cache, nothing recorded.

What differs between families is data (`EncoderConfig` and `HeadConfig`, made in `families/encoders.py`). Sequences lie
one after the other in a `RaggedBatch`; a token sees its own sequence only. The encoder halves of encoder-decoders are
this class, too. Legend: T tokens, B sequences, K hidden size, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastserve.kernels.interface import PackedLinear
from fastserve.kernels.reference import Kernels
from fastserve.models.attention import VarlenContext
from fastserve.models.layers import MLPS, NORMS, Attention, AttentionShape, MlpShape, Rotation
from fastserve.models.parameters import ParameterLoader
from fastserve.models.pooling import POOLS
from fastserve.models.rope import Rope, RopeTable


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """Everything that tells one encoder from another; names as in `DecoderConfig`.

    Attributes:
        embedding_size: of the tables, where a projection to hidden_size follows.
        max_positions: longest sequence in tokens.
        sinusoids: how fixed positions are made (a key of `SINUSOIDS`), in place of learned ones; "": not.
        num_types: rows of the token type embedding; 0 without one.
        layer_of: per layer the one on disk whose parameters it has; several may share them.
        windows: per layer, how far a token sees to either side plus 1; 0 is all.
        norms_first: norms before attention and feed-forward (a last one at the end) instead of after.
        first_norm: whether the first layer has a norm before attention.
        embedding_norm: whether the embeddings have one.
        num_buckets, max_distance: of a relative position bias that all layers share (Raffel et al., 2020); 0: none.
    """

    vocab_size: int
    hidden_size: int
    inner_size: int
    num_layers: int
    num_heads: int
    head_size: int
    max_positions: int
    norm_epsilon: float
    activation: str
    layer_of: tuple[int, ...]
    windows: tuple[int, ...]
    ropes: tuple[Rope | None, ...]
    embedding_size: int = 0
    num_learned_positions: int = 0
    position_offset: int = 0
    sinusoids: str = ""
    num_types: int = 0
    norm: str = "layer"
    norms_first: bool = False
    first_norm: bool = True
    embedding_norm: bool = True
    mlp: str = "plain"
    bias: bool = True
    mlp_bias: bool = True
    num_buckets: int = 0
    max_distance: int = 128
    attention_scale: float = 0.0
    embedding_scale: float = 1.0

    def attention_shape(self) -> AttentionShape:
        return AttentionShape(
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_size=self.head_size,
            hidden_size=self.hidden_size,
            qkv_bias=self.bias,
            output_bias=self.bias,
            qk_norm="",
            qkv_groups=1,
            norm=self.norm,
            scale=self.attention_scale or self.head_size**-0.5,
            softcap=0.0,
            norm_epsilon=self.norm_epsilon,
        )

    def mlp_shape(self) -> MlpShape:
        return MlpShape(self.hidden_size, self.inner_size, self.activation, self.mlp_bias, 0, 0, True)


@dataclass(frozen=True, slots=True)
class HeadConfig:
    """rows -> [dense -> activation -> norm ->] output. Roles: "head_dense", "head_norm", "head_output".

    Attributes:
        pool: what of a sequence the head reads: a key of `POOLS`, or "" for every token.
        num_outputs: numbers per row.
        dense_size: width of the dense layer; 0 without one.
        activation: after the dense layer; a kernel's, or tanh.
        dense_bias: whether that layer has one.
        norm: a key of `NORMS` for the norm after it, or "".
        is_tied: the output matrix is the token embedding, with a bias of its own.
    """

    pool: str
    num_outputs: int
    dense_size: int = 0
    activation: str = ""
    dense_bias: bool = True
    norm: str = ""
    is_tied: bool = False


@dataclass(slots=True)
class RaggedBatch:
    """Whole sequences one after the other. input_ids, positions, type_ids [T] int64; starts: B + 1 ints."""

    input_ids: Tensor
    positions: Tensor
    type_ids: Tensor
    starts: list[int]

    @classmethod
    def of(cls, sequences: list[list[int]], type_ids: list[list[int]], device: torch.device) -> RaggedBatch:
        """Lay out sequences of at least one token; an empty list of type ids stands for zeros."""
        starts = [0]
        for ids in sequences:
            starts.append(starts[-1] + len(ids))
        types = [given or [0] * len(ids) for ids, given in zip(sequences, type_ids, strict=True)]
        rows = (
            [token_id for ids in sequences for token_id in ids],
            [position for ids in sequences for position in range(len(ids))],
            [kind for given in types for kind in given],
        )
        token_ids, positions, kinds = torch.tensor(rows, dtype=torch.int64, device=device).unbind()
        return cls(token_ids, positions, kinds, starts)


class EncoderLayer:
    """Attention and feed-forward, each added to its input; a norm before each, or after the sum."""

    def __init__(self, parameters: ParameterLoader, config: EncoderConfig, layer: int, bias: Tensor | None) -> None:
        def norm(role: str) -> Any:
            return NORMS[config.norm](parameters, role, config.hidden_size, config.norm_epsilon, layer)

        self._norms_first = config.norms_first
        has_norm = config.first_norm or not config.norms_first or layer > 0
        self._attention_norm: Any = norm("attention_norm") if has_norm else None
        self._attention = Attention(parameters, config.attention_shape(), layer, config.windows[layer], bias)
        self._mlp = MLPS[config.mlp](parameters, config.mlp_shape(), layer)
        self._mlp_norm = norm("mlp_norm")

    def __call__(self, x: Tensor, rotation: Rotation | None, positions: Tensor, context: VarlenContext) -> Tensor:
        kernels = context.kernels
        if self._norms_first:
            normed = x if self._attention_norm is None else self._attention_norm(x, kernels)
            x = self._attention(normed, x, rotation, positions, context)
            return self._mlp(self._mlp_norm(x, kernels), x, kernels)
        x = self._attention_norm(self._attention(x, x, rotation, positions, context), kernels)
        return self._mlp_norm(self._mlp(x, x, kernels), kernels)


class Encoder:
    """Token ids of whole sequences to hidden states, and a head's scores. Parameters are read while it is built."""

    def __init__(
        self,
        config: EncoderConfig,
        parameters: ParameterLoader,
        head: HeadConfig | None = None,
        embedding: PackedLinear | Tensor | None = None,
    ) -> None:
        """embedding: the table, where the network has it already."""
        self.config, self.device, self.head_config = config, parameters.device, head
        self._kernels, self._dtype = parameters.kernels, parameters.dtype
        size = config.embedding_size or config.hidden_size
        self._embedding: PackedLinear | Tensor
        if embedding is not None:
            self._embedding = embedding
        elif head is not None and head.is_tied:
            self._embedding = parameters.linear({"embedding": config.vocab_size}, size, bias=False)
        else:
            self._embedding = parameters.tensor("embedding", (config.vocab_size, size))
        self._types = self._norm = self._projection = None
        self._positions = position_table(config, parameters, size)
        if config.num_types:
            self._types = parameters.tensor("type_embedding", (config.num_types, size))
        if config.embedding_norm:
            self._norm = NORMS[config.norm](parameters, "embedding_norm", size, config.norm_epsilon)
        if size != config.hidden_size:
            self._projection = parameters.linear({"embedding_projection": config.hidden_size}, size, bias=True)
        bias = distance_bias(config, parameters, is_causal=False)
        made = {layer: EncoderLayer(parameters, config, layer, bias) for layer in sorted({*config.layer_of})}
        self._layers = [made[layer] for layer in config.layer_of]
        self._final_norm = None
        if config.norms_first:
            self._final_norm = NORMS[config.norm](parameters, "final_norm", config.hidden_size, config.norm_epsilon)
        ropes = list(dict.fromkeys(rope for rope in config.ropes if rope is not None))
        tables = {rope: RopeTable(rope, config.max_positions, parameters.device) for rope in ropes}
        self._tables = [None if rope is None else tables[rope] for rope in config.ropes]
        self._head = None if head is None else Head(parameters, head, config)
        self.shape = parameters.shape(config, config.num_heads)

    @torch.inference_mode()
    def forward(self, batch: RaggedBatch) -> Tensor:
        """Hidden states [T, K] after the last layer."""
        kernels = self._kernels
        x = kernels.embed(self._embedding, batch.input_ids, self._dtype, scale=self.config.embedding_scale)
        if self._positions is not None:
            x = kernels.embed(self._positions, batch.positions, self._dtype, residual=x)
        if self._types is not None:
            x = kernels.embed(self._types, batch.type_ids, self._dtype, residual=x)
        if self._norm is not None:
            x = self._norm(x, kernels)
        if self._projection is not None:
            x = kernels.linear(self._projection, x)
        context = VarlenContext(kernels, batch.starts)
        for layer, table in zip(self._layers, self._tables, strict=True):
            rotation = None if table is None else table.rotation(context.longest)
            x = layer(x, rotation, batch.positions, context)
        return x if self._final_norm is None else self._final_norm(x, kernels)

    @torch.inference_mode()
    def scores(self, hidden: Tensor, batch: RaggedBatch, rows: Tensor | None = None) -> Tensor:
        """The head's numbers in float32: [B, N], or [T, N] of a head that reads every token ([R, N] of `rows` [R])."""
        assert self._head is not None and self.head_config is not None
        if self.head_config.pool:
            hidden = POOLS[self.head_config.pool](hidden, batch.starts).to(hidden.dtype)
        elif rows is not None:
            hidden = self._kernels.embed(hidden, rows, hidden.dtype)
        return self._head(hidden, self._embedding, self._kernels)


class Head:
    """See `HeadConfig`."""

    def __init__(self, parameters: ParameterLoader, config: HeadConfig, encoder: EncoderConfig) -> None:
        size = encoder.hidden_size
        self._activation = config.activation
        self._dense = self._norm = self._output = self._output_bias = None
        if config.dense_size:
            self._dense = parameters.linear({"head_dense": config.dense_size}, size, config.dense_bias)
            size = config.dense_size
        if config.norm:
            self._norm = NORMS[config.norm](parameters, "head_norm", size, encoder.norm_epsilon)
        if config.is_tied:
            self._output_bias = parameters.tensor("head_output", (config.num_outputs,), suffix="bias").float()
        else:
            self._output = parameters.linear({"head_output": config.num_outputs}, size, bias=True)

    def __call__(self, x: Tensor, embedding: PackedLinear | Tensor, kernels: Kernels) -> Tensor:
        if self._dense is not None:
            x = kernels.linear(self._dense, x, "" if self._activation == "tanh" else self._activation)
            x = torch.tanh(x) if self._activation == "tanh" else x
        if self._norm is not None:
            x = self._norm(x, kernels)
        if self._output is not None:
            return kernels.linear(self._output, x, is_wide=True)
        assert isinstance(embedding, PackedLinear) and self._output_bias is not None
        return kernels.linear(embedding, x, is_wide=True) + self._output_bias


# Frequencies of fixed positions, by the number of them: as in Vaswani et al. (2017), and as in tensor2tensor.
SINUSOIDS: dict[str, Callable[[int], Tensor]] = {
    "paper": lambda count: -torch.arange(count, dtype=torch.float64) / count,
    "tensor2tensor": lambda count: -torch.arange(count, dtype=torch.float64) / (count - 1),
}


def position_table(config: EncoderConfig, parameters: ParameterLoader, size: int) -> Tensor | None:
    """What is added to embeddings of `size`, a row per position; None: nothing."""
    if config.num_learned_positions:
        rows = parameters.tensor("position_embedding", (config.num_learned_positions, size))
        return rows[config.position_offset :]
    if not config.sinusoids:
        return None
    positions = torch.arange(config.max_positions, dtype=torch.float64) + config.position_offset
    angles = positions[:, None] * 10000.0 ** SINUSOIDS[config.sinusoids](size // 2)
    return torch.cat((angles.sin(), angles.cos()), dim=1).to(parameters.device, parameters.dtype).contiguous()


def distance_bias(config: EncoderConfig, parameters: ParameterLoader, is_causal: bool) -> Tensor | None:
    """What all layers add to their scores, see `Scores.bias`; on disk it is by bucket, [num_buckets, H].

    Half of the buckets are single distances, the rest grow logarithmically up to max_distance (Raffel et al., 2020,
    section 2.1); in both directions unless is_causal.
    """
    if not config.num_buckets:
        return None
    table = parameters.tensor("relative_bias", (config.num_buckets, config.num_heads))
    num_buckets = table.shape[0] if is_causal else table.shape[0] // 2
    distances = torch.arange(-config.max_positions, config.max_positions + 1)
    behind = -distances.clamp(max=0) if is_causal else distances.abs()
    exact = num_buckets // 2
    large = (behind.clamp(min=1).float() / exact).log() / math.log(config.max_distance / exact) * (num_buckets - exact)
    buckets = behind.where(behind < exact, (exact + large.long()).clamp(max=num_buckets - 1))
    if not is_causal:
        buckets = buckets + (distances > 0) * num_buckets
    return table.float()[buckets.to(table.device)].t().contiguous()
