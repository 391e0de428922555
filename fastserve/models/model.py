"""What the engine needs from any network that generates: two calls and its shape.

Implemented by `decoder.Decoder` (our own modules) and `transformers_backend.TransformersModel` (everything else).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from fastserve.kernels.reference import Kernels
from fastserve.models.attention import AttentionContext


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Numbers that memory planning and the scheduler need.

    Attributes:
        num_layers: layers that hold keys and values.
        num_heads, num_kv_heads, head_size: attention heads, key/value heads, numbers per head.
        max_positions: longest sequence in tokens.
        dtype: of activations, and of keys and values.
        windows: per layer the sliding window in tokens; 0 sees everything.
        num_parameters: tied ones counted once.
        weight_bytes: memory of the parameters as loaded.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    dtype: torch.dtype
    windows: tuple[int, ...]
    num_parameters: int
    weight_bytes: int


def same_fields(source: Any, kind: Any) -> dict[str, Any]:
    """What `source` has of the dataclass `kind`'s fields, by name."""
    return {field.name: getattr(source, field.name) for field in fields(kind) if hasattr(source, field.name)}


class ServingModel(Protocol):
    """A network for serving. Stateless between steps, unless `has_own_cache`.

    Attributes:
        shape: its numbers.
        device: where its parameters are.
        kernels: what `logits` is computed with.
        has_own_cache: keeps keys and values (or other state) itself, one request at a time; then no KV blocks are
            read, prefixes cannot be shared, a sequence's tokens must come in order, and `release` must be called.
    """

    shape: ModelShape
    device: torch.device
    kernels: Kernels
    has_own_cache: bool = False

    def forward(
        self, input_ids: Tensor, positions: Tensor, context: AttentionContext, rows: Tensor | None = None
    ) -> Tensor:
        """input_ids and positions [T] int64 -> hidden states [T, hidden_size], after the last norm.

        rows [R] int64: the tokens whose hidden states are wanted, [R, hidden_size]; None: all.
        """

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden_size] -> logits [R, vocab_size] in float32."""
        return self.finish(self.head(hidden, self.kernels))

    def head(self, hidden: Tensor, kernels: Kernels) -> Tensor:
        """What `finish` makes logits of, by these kernels alone: [R, vocab_size]. The largest stays largest."""

    def finish(self, logits: Tensor) -> Tensor:
        """What `head` gave -> logits [R, vocab_size] in float32."""
        return logits

    def reserve(self, num_positions: int) -> None:
        """Make what depends on the length for sequences of so many tokens: a recorded step keeps its addresses."""
        return

    def release(self, request_ids: list[str]) -> None:
        """Forget what is kept for these requests. Does nothing without `has_own_cache`."""
        return
