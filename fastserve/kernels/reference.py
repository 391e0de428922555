"""Every operation in plain PyTorch: obvious, portable, and the definition of correct for the other backends.

Runs on any device. In float32 on a CPU a row of `linear` is the same to the bit at every number of rows: the BLAS
library takes other loops for 1, 2, 3 and odd row counts, so rows are padded to a multiple of four there (measured;
bfloat16 through oneDNN needs no padding).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastserve.core.errors import ConfigError
from fastserve.kernels.interface import Batch, KernelSpec, PackedLinear

_ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}
_ROW_MULTIPLE = 4


class ReferenceKernels:
    """Plain PyTorch. See `Kernels` for what each operation means."""

    name = "reference"

    def supports(self, spec: KernelSpec) -> list[str]:
        return []

    def pack_linear(self, weight: Tensor, bias: Tensor | None) -> PackedLinear:
        return PackedLinear(weight, bias)

    def linear(self, packed: PackedLinear, x: Tensor) -> Tensor:
        num_rows = x.shape[0]
        if x.dtype is torch.float32 and x.device.type == "cpu" and num_rows % _ROW_MULTIPLE:
            x = functional.pad(x, (0, 0, 0, -num_rows % _ROW_MULTIPLE))
            return functional.linear(x, packed.weight, packed.bias)[:num_rows]
        return functional.linear(x, packed.weight, packed.bias)

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        return weight * wide.to(x.dtype)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
        return functional.layer_norm(x, weight.shape, weight, bias, epsilon)

    def apply_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = cos.shape[-1]
        cos = cos.unsqueeze(1).to(x.dtype)  # [T, 1, R/2]
        sin = sin.unsqueeze(1).to(x.dtype)
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

    def gated_activation(self, x: Tensor, activation: str) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return self.activation(gate, activation) * up

    def activation(self, x: Tensor, activation: str) -> Tensor:
        if activation not in _ACTIVATIONS:
            raise ConfigError(f"activation {activation!r} is not known; known: {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[activation](x)

    def store_kv(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slot_mapping: Tensor) -> None:
        keys.view(-1, *keys.shape[2:])[slot_mapping] = key.to(keys.dtype)
        values.view(-1, *values.shape[2:])[slot_mapping] = value.to(values.dtype)

    def paged_attention(
        self, query: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float, window: int, softcap: float
    ) -> Tensor:
        output = torch.empty_like(query)
        for index, block_table in enumerate(batch.block_tables):
            start, end = batch.query_starts[index], batch.query_starts[index + 1]
            context_len = batch.context_lens[index]
            first = 0  # first position that any query of this sequence sees
            if window:
                first = max(0, context_len - (end - start) - window + 1)
            block_size = keys.shape[1]
            blocks = block_table[first // block_size : -(-context_len // block_size)]
            skipped = first // block_size * block_size
            key = keys.index_select(0, blocks).flatten(0, 1)[: context_len - skipped]  # [S, G, D]
            value = values.index_select(0, blocks).flatten(0, 1)[: context_len - skipped]
            output[start:end] = self._attend(query[start:end], key, value, context_len, skipped, scale, window, softcap)
        return output

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        context_len: int,
        skipped: int,
        scale: float,
        window: int,
        softcap: float,
    ) -> Tensor:
        """One sequence: query [Q, H, D] are its last Q positions; key, value [S, G, D] start at position `skipped`."""
        num_queries, num_keys = query.shape[0], key.shape[0]
        is_whole_prompt = num_queries == num_keys and not window
        mask = None
        if not is_whole_prompt and (num_queries > 1 or window):
            mask = causal_mask(num_queries, num_keys, context_len, skipped, window, query.device)
        if softcap:
            if is_whole_prompt:
                mask = causal_mask(num_queries, num_keys, context_len, skipped, window, query.device)
            return _attend_softcap(query, key, value, mask, scale, softcap)
        result = functional.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            key.to(query.dtype).transpose(0, 1).unsqueeze(0),
            value.to(query.dtype).transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            is_causal=is_whole_prompt and num_queries > 1,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return result[0].transpose(0, 1)

    def copy_blocks(self, keys: Tensor, values: Tensor, pairs: list[tuple[int, int]]) -> None:
        source = torch.tensor([pair[0] for pair in pairs], device=keys.device)
        target = torch.tensor([pair[1] for pair in pairs], device=keys.device)
        keys[target] = keys[source]
        values[target] = values[source]


def causal_mask(
    num_queries: int, num_keys: int, context_len: int, skipped: int, window: int, device: torch.device
) -> Tensor:
    """True where query (row) may see key (column): [num_queries, num_keys] bool."""
    query_positions = torch.arange(context_len - num_queries, context_len, device=device).unsqueeze(1)
    key_positions = torch.arange(skipped, skipped + num_keys, device=device).unsqueeze(0)
    mask = key_positions <= query_positions
    if window:
        mask &= key_positions > query_positions - window
    return mask


def _attend_softcap(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:
    group = query.shape[1] // key.shape[1]
    wide_key = key.repeat_interleave(group, dim=1).float()
    wide_value = value.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), wide_key) * scale
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1).to(value.dtype), wide_value)
