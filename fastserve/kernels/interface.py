"""What goes into the operations of a backend and comes out of them; the operations themselves are in `reference.py`.

Legend: T tokens in the step (all sequences, no padding), B sequences, H query heads, G key/value heads, D head size,
N output features, K input features. All tensors are on the backend's device.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fastserve.checkpoint.quantized import QuantizedWeight

Weight = Tensor | QuantizedWeight
_CPU = torch.device("cpu")


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
    """One step, padding-free. Made by `engine/batch.py` from a StepPlan.

    Attributes:
        input_ids, positions: T ints.
        slot_mapping: T ints, where token t's key and value go: block_id * block_size + offset.
        query_starts: B + 1 ints, the tokens of sequence b are query_starts[b] : query_starts[b + 1].
        context_lens: B ints, tokens in the cache after this step, the new ones included.
        block_tables: per sequence its block ids, in order.
        logit_rows: R ints, rows of the hidden states that need logits.
        request_ids: the B sequences, for models that keep a cache of their own.
        adapter_slots: [T] and [R] int64, the slots of the adapters of tokens and of logit rows, -1 for none; empty when
            no sequence has one.
        source_lens, source_tables: of encoder-decoders, tokens of each sequence's source and the blocks that hold its
            keys and values.
    """

    input_ids: list[int]
    positions: list[int]
    slot_mapping: list[int]
    query_starts: list[int]
    context_lens: list[int]
    block_tables: list[list[int]]
    logit_rows: list[int]
    request_ids: list[str] = field(default_factory=list)
    adapter_slots: list[Tensor] = field(default_factory=list)
    source_lens: list[int] = field(default_factory=list)
    source_tables: list[list[int]] = field(default_factory=list)
    device: torch.device = _CPU
    _tensors: list[Tensor] = field(default_factory=list, init=False, repr=False)
    _tables: dict[bool, list[Tensor]] = field(default_factory=dict, init=False, repr=False)

    def advance(self, token_ids: list[int]) -> None:
        """Where all sequences decode: their next tokens, each in the block of the one before."""
        self.input_ids = token_ids
        for part in (self.positions, self.slot_mapping, self.context_lens):
            part[:] = [value + 1 for value in part]
        self._tensors, self._tables = [], {}

    def tensors(self) -> list[Tensor]:
        """input_ids, positions, slot_mapping [T] and logit_rows [R] in int64: for who computes with tensors."""
        if not self._tensors:
            values = (self.input_ids, self.positions, self.slot_mapping, self.logit_rows)
            self._tensors = [torch.tensor(part, dtype=torch.int64, device=self.device) for part in values]
        return self._tensors

    def table_tensors(self, of_source: bool) -> list[Tensor]:
        """block_tables or source_tables in int64, made once for all layers."""
        if of_source not in self._tables:
            tables = self.source_tables if of_source else self.block_tables
            self._tables[of_source] = [torch.tensor(table, dtype=torch.int64, device=self.device) for table in tables]
        return self._tables[of_source]


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


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What becomes of the products of a query and the keys, before the softmax.

    Attributes:
        scale: factor on the products.
        window: w > 0: only keys less than w positions away count; 0: all that the query may see.
        softcap: c > 0 replaces scores s by c * tanh(s / c).
        bias: [H, 2 R + 1] float32, contiguous: bias[h, R + key position - query position] is added; R at least the
            longest sequence - 1. Without softcap, and where attention is causal without window, too.
    """

    scale: float
    window: int = 0
    softcap: float = 0.0
    bias: Tensor | None = None


class RecordedStep(Protocol):
    """A network that was recorded once and runs as a whole (see `Kernels.record`)."""

    num_operations: int

    def run(self, batch: Batch, choose: bool, num_rounds: int = 1, end_ids: Collection[int] = ()) -> list[int]:
        """Compute a step. If `choose`, the index of the largest logit of each row, the first among equals.

        Of several rounds each but the first takes what the last chose (see `Batch.advance`), until one of `end_ids`.
        """

    def logits(self) -> Tensor:
        """[R, V] float32 of the last run, valid until the next."""


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
        step: Batch.adapter_slots of the step, in a list that all linears of a network share; whoever runs the network
            sets its items before.
        weights: slot -> A [R, K] and B [N, R], in the reference.
        native: a backend's own object.
    """

    step: list[Tensor]
    weights: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    native: Any = None

    def slots(self, num_rows: int) -> Tensor | None:
        """[num_rows] int64 for inputs that have a row per token, or per logit row; None when no row has an adapter."""
        return next((slots for slots in self.step if len(slots) == num_rows), None)


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
