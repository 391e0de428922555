"""Every operation in plain PyTorch: obvious, portable, and the definition of correct for the other backends.

Those subclass `Kernels`, one level deep, and override what they speed up; `select.py` chooses one at load. This one
runs on any device. On a CPU the rows of `linear` are padded to one of a few counts, for two reasons that were measured
(docs/decisions/0002): in float32 a row is the same to the bit whatever else is in the step only at multiples of four,
and in bfloat16 oneDNN keeps memory for every row count that it has seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastserve.checkpoint.quantized import QuantizedWeight
from fastserve.core.errors import ConfigError
from fastserve.kernels.interface import (
    Batch,
    HeadTransform,
    KernelSpec,
    LinearAdapters,
    PackedLinear,
    RecordedStep,
    RowSampling,
    Scores,
    Weight,
)
from fastserve.kernels.quant import concatenate, int8_kv_views, quantize_activations, quantize_kv

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}
_WEIGHT_ONE = 1 << 30
_EXP_TERMS = (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


class Kernels:
    """About ten operations. Legend and shapes as in `interface.py`; none keeps state between calls."""

    name = "reference"

    def supports(self, spec: KernelSpec) -> list[str]:
        """Reasons why this backend cannot serve `spec`; an empty list means it can."""
        return []

    def pack_linear(
        self, weight: Weight | Sequence[Weight], bias: Tensor | None, is_gated: bool = False
    ) -> PackedLinear:
        """Turn weight [N, K] and bias [N] into the layout that `linear` reads. Called once per layer, at load.

        weight: a matrix, which may be kept; or its parts from top to bottom, of one type or scheme and codebook, which
            may lie in a file and are not kept.
        is_gated: the first N / 2 rows are the gate, the others are up.
        """
        if isinstance(weight, Sequence):
            weight = concatenate(weight)
        if isinstance(weight, QuantizedWeight):
            activation_bits = weight.scheme.activation_bits
            return PackedLinear(weight.dequantize(), bias, is_gated=is_gated, activation_bits=activation_bits)
        return PackedLinear(weight, bias, is_gated=is_gated)

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
        result = self._product(packed, x)
        if packed.adapters is not None and (slots := packed.adapters.slots(len(x))) is not None:
            result = _adapted(result, x, packed.adapters.weights, slots)
        if is_wide:
            result = result.float()
        if packed.is_gated:
            result = self.gated_activation(result, activation)
        elif activation:
            result = self.activation(result, activation)
        return result if residual is None else result + residual

    def _product(self, packed: PackedLinear, x: Tensor) -> Tensor:
        dtype, scales = x.dtype, None
        if packed.activation_bits == 8:
            x, scales = quantize_activations(x)
        weight, bias = packed.weight, packed.bias
        x = x.to(weight.dtype)  # a quantised weight is held dequantised, in float32
        if scales is None:
            return _multiply(x, weight, None if bias is None else bias.to(x.dtype)).to(dtype)
        result = _multiply(x, weight) * scales
        return (result if bias is None else result + bias).to(dtype)

    def allow_adapters(self, packed: PackedLinear, step: list[Tensor], num_slots: int) -> None:
        """Make room for the adapters of a linear, before its network is recorded. See `LinearAdapters.step`."""
        packed.adapters = LinearAdapters(step)

    def set_adapter(
        self, packed: PackedLinear, slot: int, weights: tuple[Tensor, Tensor] | None, dtype: torch.dtype
    ) -> None:
        """Put float32 A [R, K] and B [N, R] into a slot, kept in `dtype`, the type of x; or empty it (None)."""
        assert packed.adapters is not None
        packed.adapters.weights.pop(slot, None)
        if weights is not None:
            # Rounded to the type that other backends keep, and computed in float32 as they do.
            a, b = (item.to(packed.weight.device, dtype).float() for item in weights)
            packed.adapters.weights[slot] = (a, b)

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
        rows = (table if isinstance(table, Tensor) else table.weight).index_select(0, ids).to(dtype)
        return _plus(rows if scale == 1.0 else rows * scale, residual)

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None) -> Tensor:
        """x [..., K] scaled to unit root mean square in float32, times weight [K] (Zhang and Sennrich, 2019).

        residual [T, K], for x [T, K], is added to the result.
        """
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        return _plus(weight * wide.to(x.dtype), residual)

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, residual: Tensor | None = None
    ) -> Tensor:
        """x [..., K] to zero mean and unit variance, times weight, plus bias (Ba et al., 2016); plus residual."""
        return _plus(functional.layer_norm(x, weight.shape, weight, bias, epsilon), residual)

    def apply_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the first R of D entries of x [T, H, D] by cos, sin [T, R/2], halves convention (Su et al., 2021)."""
        half = cos.shape[-1]
        cos = cos.unsqueeze(1).to(x.dtype)  # [T, 1, R/2]
        sin = sin.unsqueeze(1).to(x.dtype)
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

    def gated_activation(self, x: Tensor, activation: str) -> Tensor:
        """x [T, 2 * K] as gate and up halves -> activation(gate) * up, [T, K]."""
        gate, up = x.chunk(2, dim=-1)
        return self.activation(gate, activation) * up

    def activation(self, x: Tensor, activation: str) -> Tensor:
        """Element-wise silu, gelu, gelu_tanh or relu."""
        if activation not in _ACTIVATIONS:
            raise ConfigError(f"activation {activation!r} is not known; known: {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[activation](x)

    def store_kv(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slot_mapping: Tensor) -> None:
        """Write key, value [T, G, D] into the caches keys, values [num_blocks, block_size, G, D] at slot_mapping.

        Other kernels may order the bytes of a block as they please: it is read by the kernels that wrote it alone.
        int8 caches: as `int8_kv_views` of quant.py reads them; x = scale * byte, scale = largest magnitude of a token's
        head / 127, rounded to nearest even.
        """
        for new, cache in ((key, keys), (value, values)):
            if cache.dtype is torch.int8:
                blocks, offsets = slot_mapping // cache.shape[1], slot_mapping % cache.shape[1]
                for view, part in zip(int8_kv_views(cache), quantize_kv(new), strict=True):
                    view[blocks, offsets] = part
            else:
                cache.view(-1, *cache.shape[2:])[slot_mapping] = new.to(cache.dtype)

    def transform_heads(self, query: Tensor, key: Tensor, how: HeadTransform) -> tuple[Tensor, Tensor]:
        """Heads of queries [T, H, D] and of keys [T, G, D], normed and rotated."""
        if how.query_norm is not None and how.key_norm is not None:
            query = self.rms_norm(query, how.query_norm, how.epsilon)
            key = self.rms_norm(key, how.key_norm, how.epsilon)
        if how.cos is not None and how.sin is not None:
            cos, sin = (table.index_select(0, how.positions) for table in (how.cos, how.sin))
            query, key = self.apply_rope(query, cos, sin), self.apply_rope(key, cos, sin)
        return query, key

    def transform_and_store(
        self, query: Tensor, key: Tensor, value: Tensor, how: HeadTransform, keys: Tensor, values: Tensor, slots: Tensor
    ) -> Tensor:
        """`transform_heads` on query [T, H, D] and key [T, G, D], then `store_kv`; returns the query."""
        query, key = self.transform_heads(query, key, how)
        self.store_kv(key, value, keys, values, slots)
        return query

    def paged_attention(
        self, query: Tensor, keys: Tensor, values: Tensor, batch: Batch, scores: Scores, of_source: bool = False
    ) -> Tensor:
        """Causal attention of query [T, H, D] over each sequence's cached keys and values -> [T, H, D].

        A query at position p sees positions max(0, p - window + 1) .. p. of_source: all of its sequence's source, in
        `batch.source_tables`, instead; by `scale` alone.
        """
        output = torch.empty_like(query)
        block_size, window = keys.shape[1], scores.window
        tables, lengths = batch.table_tensors(of_source), batch.source_lens if of_source else batch.context_lens
        for index, (table, length) in enumerate(zip(tables, lengths, strict=True)):
            start, end = batch.query_starts[index], batch.query_starts[index + 1]
            first = max(0, length - (end - start) - window + 1) if window else 0  # earliest position seen
            blocks = table[first // block_size : -(-length // block_size)]
            inside = slice(first % block_size, first % block_size + length - first)
            key, value = (_gather(cache, blocks)[inside].to(query.dtype) for cache in (keys, values))  # [S, G, D]
            part = query[start:end]
            output[start:end] = (
                _attend_masked(part, key, value, scores.scale) if of_source else _attend(part, key, value, scores)
            )
        return output

    def varlen_attention(
        self, query: Tensor, key: Tensor, value: Tensor, query_starts: list[int], key_starts: list[int], scores: Scores
    ) -> Tensor:
        """Bidirectional attention without a cache: query [T, H, D], key and value [S, G, D] -> [T, H, D].

        Queries query_starts[b] : query_starts[b + 1] see keys key_starts[b] : key_starts[b + 1]; with a window or a
        bias they are the last of the keys' positions. No softcap.
        """
        assert not scores.softcap
        output = torch.empty_like(query)
        for start, end, first, last in zip(query_starts, query_starts[1:], key_starts, key_starts[1:], strict=False):
            mask = _mask(end - start, last - first, scores, False, query.device)
            output[start:end] = _attend_masked(query[start:end], key[first:last], value[first:last], scores.scale, mask)
        return output

    def argmax(self, logits: Tensor) -> Tensor:
        """Index of the largest of each row of logits [R, V], the first among equals: [R] int64. NaN counts as -inf."""
        return logits.nan_to_num(-math.inf, math.inf, -math.inf).argmax(dim=-1)

    def most_probable(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of rows of logits [R, V] float32: log of the sum of e^x [R, 1], the largest [R, count], and their ids, which
        mean nothing for -inf."""
        return (torch.logsumexp(logits, dim=-1, keepdim=True), *logits.topk(count))

    def copy_blocks(self, parts: list[Tensor], pairs: list[tuple[int, int]]) -> None:
        """Copy blocks source -> target in every part [num_blocks, ...]; no block is both."""
        sources, targets = torch.tensor(pairs, device=parts[0].device).unbind(1)
        for part in parts:
            part.index_copy_(0, targets, part.index_select(0, sources))

    def sample(self, logits: Tensor, rows: list[RowSampling]) -> list[int]:
        """Draw one token per row of logits [R, V]; see `RowSampling`."""
        return [_draw(row, how) for row, how in zip(logits, rows, strict=True)]

    def record(self, network: Callable[[Kernels, Batch], Tensor], longest: int) -> RecordedStep | str:
        """Record `network` (a step's batch -> logits [R, V]), to be run as a whole; or say why that cannot be.

        The network is called once, with kernels that only take notes. It must compute nothing but by them, and do the
        same whatever the step. longest: tokens of the longest sequence that a step may have.
        """
        return f"the {self.name} kernels run one operation at a time"


def _plus(x: Tensor, residual: Tensor | None) -> Tensor:
    return x if residual is None else x + residual


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] times weight [N, K] transposed, plus bias; on a CPU with rows added as `padded_rows` says."""
    num_rows = x.shape[0]
    padding = padded_rows(num_rows, x.dtype) - num_rows if x.device.type == "cpu" else 0
    if not padding:
        return functional.linear(x, weight, bias)
    return functional.linear(functional.pad(x, (0, 0, 0, padding)), weight, bias)[:num_rows]


def _adapted(result: Tensor, x: Tensor, weights: dict[int, tuple[Tensor, Tensor]], slots: Tensor) -> Tensor:
    """result [T, N] plus B A x for the rows whose slot has a pair; rows of one slot are computed together."""
    result = result.clone()
    for slot, (a, b) in weights.items():
        rows = (slots == slot).nonzero()[:, 0]
        if len(rows):
            delta = _multiply(_multiply(x[rows].float(), a), b)
            result[rows] = (result[rows].float() + delta).to(result.dtype)
    return result


def padded_rows(num_rows: int, dtype: torch.dtype) -> int:
    """The row count that `linear` computes on a CPU: few as they are, then multiples of 8, of 32, and of 64."""
    if num_rows <= 4:
        return 4 if dtype is torch.float32 else num_rows
    multiple = 8 if num_rows <= 64 else 32 if num_rows <= 256 else 64
    return -(-num_rows // multiple) * multiple


def _attend(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> Tensor:
    """One sequence, causally: query [Q, H, D] are its last Q positions, key and value [S, G, D] its last S; S >= Q."""
    num_queries, num_heads, size = query.shape
    num_keys, num_kv_heads = key.shape[:2]
    if num_queries == 1 and not scores.softcap and scores.bias is None:
        # The query heads that share a key head go in as its queries: keys are then read once, not once a query head.
        query = query.view(num_kv_heads, num_heads // num_kv_heads, size).transpose(0, 1)
        return _attend_masked(query, key, value, scores.scale).transpose(0, 1).reshape(1, num_heads, size)
    if num_queries == num_keys and not scores.window and not scores.softcap and scores.bias is None:
        return _attend_masked(query, key, value, scores.scale, is_causal=True)
    mask = _mask(num_queries, num_keys, scores, True, query.device)
    if not scores.softcap:
        return _attend_masked(query, key, value, scores.scale, mask)
    key, value = (item.transpose(0, 1).repeat_interleave(num_heads // num_kv_heads, dim=0) for item in (key, value))
    products = torch.einsum("qhd,hkd->hqk", query.float(), key.float()) * scores.scale
    capped = scores.softcap * torch.tanh(products / scores.softcap) + mask
    return torch.einsum("hqk,hkd->qhd", capped.softmax(-1).to(value.dtype), value)


def _mask(num_queries: int, num_keys: int, scores: Scores, is_causal: bool, device: torch.device) -> Tensor:
    """What is added to scores [Q, S] or [H, Q, S]: -inf where a query may not see a key, and the bias. The last query
    is at the last key."""
    positions = torch.arange(num_keys - num_queries, num_keys, device=device).unsqueeze(1)
    distances = torch.arange(num_keys, device=device) - positions  # [Q, S]
    hidden = distances > (0 if is_causal else num_keys + num_queries)
    if scores.window:
        hidden |= distances.abs() >= scores.window
    mask = torch.zeros(distances.shape, device=device).masked_fill(hidden, float("-inf"))
    return mask if scores.bias is None else mask + scores.bias[:, distances + scores.bias.shape[1] // 2]


def _attend_masked(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """query [Q, H, D] over key, value [S, G, D] -> [Q, H, D]; `mask` is added to the scores."""
    query, key, value = (item.transpose(0, 1).unsqueeze(0) for item in (query, key, value))
    result = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if mask is None else mask.to(query.dtype),
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return result[0].transpose(0, 1)


def _gather(cache: Tensor, blocks: Tensor) -> Tensor:
    """Blocks of a cache as one sequence [S, G, D]; int8 ones as the float32 that they stand for."""
    taken = cache.index_select(0, blocks)
    if cache.dtype is torch.int8:
        values, scales = int8_kv_views(taken)
        taken = values.float() * scales.unsqueeze(-1)
    return taken.flatten(0, 1)


def _draw(logits: Tensor, how: RowSampling) -> int:
    """One token from a row [V], as `RowSampling` defines it."""
    logits = logits.float().nan_to_num(float("-inf"), float("inf"), float("-inf"))
    best = int((logits == logits.max()).nonzero()[0])  # argmax does not promise the first
    if how.inverse_temperature == 0.0:
        return best
    weights = _weights((logits - logits[best]) * how.inverse_temperature)
    if 0 < how.top_k < len(logits):
        weights = weights.where(logits >= logits.topk(how.top_k).values[-1], 0)
    limit = 1
    if how.top_p < 1.0:
        ordered = weights.sort(descending=True).values
        sums = ordered.cumsum(-1)
        wanted = min(max(1, math.ceil(how.top_p * float(sums[-1]))), int(sums[-1]))
        limit = max(1, int(ordered[int(torch.searchsorted(sums, wanted))])) if wanted else 1
    limit = max(limit, math.ceil(how.min_p * _WEIGHT_ONE))
    sums = weights.where(weights >= limit, 0).cumsum(-1)
    kept = int(sums[-1])
    return int(torch.searchsorted(sums, (how.random * kept) >> 53, right=True)) if kept else best


def _weights(x: Tensor) -> Tensor:
    """2^30 e^x for x <= 0, cut to integers. Each product and sum is rounded on its own, as elsewhere: the polynomial is
    Cephes's expf. [V] float32 -> [V] int64."""
    x = x.nan_to_num(-87.0, -87.0, -87.0).clamp(min=-87.0)
    n = (x * 1.44269504).round()
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    p = torch.full_like(r, 1.9875691500e-4)
    for term in _EXP_TERMS:
        p = p * r + term
    p = (p * (r * r) + r) + 1.0
    return (p * ((n.int() + (127 + 30)) << 23).view(torch.float32)).long()
