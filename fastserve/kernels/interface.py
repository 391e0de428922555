"""The operations a backend computes, and nothing about why or when.

Legend: T tokens in the step (all sequences, no padding), B sequences, H query heads, G key/value heads, D head size,
N output features, K input features. All tensors are on the backend's device. `reference.py` implements every
operation in plain PyTorch and defines correct; other backends subclass it, one level deep, and override what they
speed up. A backend is chosen once, at load, by `select.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fastserve.kernels.quant import QuantizedWeight

Weight = Tensor | QuantizedWeight


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """What a model needs from a backend: where, in which precision, with which head shapes."""

    device: str
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_size: int
    block_size: int


@dataclass(slots=True)
class Batch:
    """One step as tensors, padding-free. Made by `engine/batch.py` from a StepPlan.

    Attributes:
        input_ids, positions: [T] int64.
        slot_mapping: [T] int64, where token t's key and value go: block_id * block_size + offset.
        query_starts: B + 1 ints, the tokens of sequence b are query_starts[b] : query_starts[b + 1].
        context_lens: B ints, tokens in the cache after this step, the new ones included.
        block_tables: per sequence the int64 tensor of its block ids, in order.
        logit_rows: [R] int64, rows of the hidden states that need logits.
        request_ids: the B sequences, for models that keep a cache of their own.
        adapter_slots: [T] int64, the slot of each token's adapter or -1; None when no sequence has one.
    """

    input_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_starts: list[int]
    context_lens: list[int]
    block_tables: list[Tensor]
    logit_rows: Tensor
    request_ids: list[str] = field(default_factory=list)
    adapter_slots: Tensor | None = None


@dataclass(frozen=True, slots=True)
class HeadTransform:
    """What happens to query and key heads before they meet: a norm of each head, then a rotation; either may be absent.

    Attributes:
        query_norm, key_norm: weights [D] of root-mean-square norms.
        cos, sin: [positions, R/2] float32, a row per position.
        positions: [T] int64.
    """

    query_norm: Tensor | None
    key_norm: Tensor | None
    epsilon: float
    cos: Tensor | None
    sin: Tensor | None
    positions: Tensor


class RecordedStep(Protocol):
    """A network that was recorded once and runs as a whole (see `Kernels.record`)."""

    num_operations: int

    def run(self, batch: Batch, choose: bool) -> tuple[Tensor, list[int]]:
        """Logits [R, V] float32, valid until the next run, and if `choose` the index of the largest of each row."""


@dataclass(frozen=True, slots=True)
class RowSampling:
    """How one row of logits is drawn from.

    A weight is e^((logit - largest) * inverse_temperature) in 30 fractional bits, cut off; all sums are of integers, so
    no backend's order of summation matters. What is kept: the top_k largest logits (equal ones too), of these the
    fewest largest weights that reach the share top_p, of these the weights that are at least min_p. The token is the
    first at which the running sum of the kept weights exceeds (random * their sum) / 2^53. NaN counts as -inf.

    Attributes:
        inverse_temperature: 0: the largest logit, the first among equals.
        top_k: 0: all.
        random: an integer below 2^53.
    """

    inverse_temperature: float
    top_k: int
    top_p: float
    min_p: float
    random: int


@dataclass(slots=True)
class LinearAdapters:
    """Low-rank adapters of one linear: B A x is added to x W^T (LoRA, Hu et al., 2021), with other A, B in each slot.

    Attributes:
        step: Batch.adapter_slots of the step, in a list of one that all linears of a network share; whoever runs the
            network sets it before.
        weights: slot -> A [R, K] and B [N, R], in the reference.
        native: a backend's own object.
    """

    step: list[Tensor | None]
    weights: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    native: Any = None


@dataclass(slots=True)
class PackedLinear:
    """A linear layer in the backend's own layout.

    Attributes:
        weight: [N, K] in the reference; other backends put their own form here, or in `native`.
        native: a backend's own object.
        is_gated: the rows of the weight are gate and up, and `linear` gives activation(gate) * up.
        activation_bits: 8: inputs are quantised per token as they come.
        adapters: None where none may be used.
        num_bytes: what it takes in memory.
    """

    weight: Tensor
    bias: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    native: Any = None
    is_gated: bool = False
    activation_bits: int = 16
    adapters: LinearAdapters | None = None

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes + (0 if self.native is None else int(self.native.bytes))


class Kernels(Protocol):
    """About ten operations. Shapes as in the module's legend; none keeps state between calls."""

    name: str

    def supports(self, spec: KernelSpec) -> list[str]:
        """Reasons why this backend cannot serve `spec`; an empty list means it can."""

    def pack_linear(
        self, weight: Weight | Sequence[Weight], bias: Tensor | None, is_gated: bool = False
    ) -> PackedLinear:
        """Turn weight [N, K] and bias [N] into the layout that `linear` reads. Called once per layer, at load.

        weight: a matrix, which may be kept; or its parts from top to bottom, of one type or scheme and codebook, which
            may lie in a file and are not kept.
        is_gated: the first N / 2 rows are the gate, the others are up.
        """

    def linear(
        self,
        packed: PackedLinear,
        x: Tensor,
        activation: str = "",
        residual: Tensor | None = None,
        is_wide: bool = False,
    ) -> Tensor:
        """x [T, K] -> activation(x W^T + bias) + residual, [T, N]; gated: activation(gate) * up, [T, N / 2].

        Where a row has an adapter (`LinearAdapters`), its B A x is added to x W^T. A row's result does not depend on
        the other rows (docs/decisions/0002). is_wide: float32 out.
        """

    def allow_adapters(self, packed: PackedLinear, step: list[Tensor | None], num_slots: int) -> None:
        """Make room for the adapters of a linear, before its network is recorded. See `LinearAdapters.step`."""

    def set_adapter(
        self, packed: PackedLinear, slot: int, weights: tuple[Tensor, Tensor] | None, dtype: torch.dtype
    ) -> None:
        """Put float32 A [R, K] and B [N, R] into a slot, kept in `dtype`, the type of x; or empty it (None)."""

    def embed(
        self,
        table: Tensor | PackedLinear,
        ids: Tensor,
        dtype: torch.dtype,
        residual: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        """Rows `ids` [T] int64 of a table [P, K], times scale, plus residual [T, K] -> [T, K] of `dtype`.

        The table may be a packed matrix that is not gated (a tied head is held once so); no residual then.
        """

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None) -> Tensor:
        """x [..., K] scaled to unit root mean square in float32, times weight [K] (Zhang and Sennrich, 2019).

        residual [T, K], for x [T, K], is added to the result.
        """

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, residual: Tensor | None = None
    ) -> Tensor:
        """x [..., K] to zero mean and unit variance, times weight, plus bias (Ba et al., 2016); plus residual."""

    def apply_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the first R of D entries of x [T, H, D] by cos, sin [T, R/2], halves convention (Su et al., 2021)."""

    def gated_activation(self, x: Tensor, activation: str) -> Tensor:
        """x [T, 2 * K] as gate and up halves -> activation(gate) * up, [T, K]."""

    def activation(self, x: Tensor, activation: str) -> Tensor:
        """Element-wise silu, gelu, gelu_tanh or relu."""

    def store_kv(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slot_mapping: Tensor) -> None:
        """Write key, value [T, G, D] into the caches keys, values [num_blocks, block_size, G, D] at slot_mapping.

        int8 caches: as `int8_kv_views` of quant.py reads them; x = scale * byte, scale = largest magnitude of a token's
        head / 127, rounded to nearest even.
        """

    def transform_heads(self, x: Tensor, norm: Tensor | None, transform: HeadTransform) -> Tensor:
        """Heads [T, H, D] of one kind, `norm` being that kind's weight -> [T, H, D]."""

    def transform_and_store(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        transform: HeadTransform,
        keys: Tensor,
        values: Tensor,
        slot_mapping: Tensor,
    ) -> Tensor:
        """`transform_heads` on query [T, H, D] and key [T, G, D], then `store_kv`; returns the query."""

    def paged_attention(
        self, query: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float, window: int, softcap: float
    ) -> Tensor:
        """Causal attention of query [T, H, D] over each sequence's cached keys and values -> [T, H, D].

        A query at position p sees positions max(0, p - window + 1) .. p; window 0 means no limit. softcap c > 0
        replaces scores s by c * tanh(s / c).
        """

    def varlen_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_starts: list[int],
        key_starts: list[int],
        scale: float,
        window: int = 0,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Bidirectional attention without a cache: query [T, H, D], key and value [S, G, D] -> [T, H, D].

        Queries query_starts[b] : query_starts[b + 1] see keys key_starts[b] : key_starts[b + 1]. window w > 0: only
        those less than w positions away (queries then are the last of the keys' positions). bias [H, 2 R + 1] float32
        is added by distance: bias[h, R + key position - query position]; R at least the longest sequence - 1.
        """

    def copy_blocks(self, keys: Tensor, values: Tensor, pairs: list[tuple[int, int]]) -> None:
        """Copy cache blocks source -> target within one layer."""

    def argmax(self, logits: Tensor) -> Tensor:
        """Index of the largest of each row of logits [R, V], the first among equals: [R] int64."""

    def sample(self, logits: Tensor, rows: list[RowSampling]) -> list[int]:
        """Draw one token per row of logits [R, V]; see `RowSampling`."""

    def record(self, network: Callable[[Kernels, Batch], Tensor], longest: int) -> RecordedStep | str:
        """Record `network` (a step's batch -> logits [R, V]), to be run as a whole; or say why that cannot be.

        The network is called once, with kernels that only take notes. It must compute nothing but by them, and do the
        same whatever the step. longest: tokens of the longest sequence that a step may have.
        """
