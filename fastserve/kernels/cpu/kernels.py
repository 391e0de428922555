"""The operations over the native library: C++ gets addresses, shapes and strides of torch's tensors, nothing is copied.

What the library does not speed up is inherited from the reference. Tensors are float32 or bfloat16 on the CPU; a last
dimension is contiguous, rows may be strided. Every operation gives a row the same bits whatever else is in the batch.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastserve.checkpoint.quantized import QuantizedWeight
from fastserve.core.errors import ConfigError
from fastserve.core.machine import usable_cpus
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
from fastserve.kernels.reference import Kernels

# Numbers of the enumerations in csrc/common.h and csrc/packed_weight.h.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_CACHE_DTYPES = {**_DTYPES, torch.int8: 2}
_SCALE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ACTIVATIONS = {"": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}
_BYTES, _NIBBLES, _CODEBOOK = 2, 3, 4
_LARGEST_HEAD = 512  # kVarlenRowBytes in csrc/ops.h
_log = logging.getLogger(__name__)


class CPUKernels(Kernels):
    """Native kernels of one instruction set.

    Args:
        backend: the library's operations and its thread pool; None when it was not built.
    """

    name = "cpu"

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    @property
    def isa(self) -> str:
        return self._backend.isa

    @property
    def native_backend(self) -> Any:
        """The library's operations and its thread pool, for those who measure them."""
        return self._backend

    def supports(self, spec: KernelSpec) -> list[str]:
        reasons = []
        if self._backend is None:
            reasons.append("the native library was not built (it needs a C++17 compiler when FastServe is installed)")
        if not spec.device.startswith("cpu"):
            reasons.append(f"the device is {spec.device}")
        if spec.dtype not in _DTYPES:
            reasons.append(f"the type is {spec.dtype}; float32 and bfloat16 are there")
        if spec.head_size > _LARGEST_HEAD:
            reasons.append(f"heads have {spec.head_size} numbers; {_LARGEST_HEAD} at most are there")
        return reasons

    def pack_linear(
        self, weight: Weight | Sequence[Weight], bias: Tensor | None, is_gated: bool = False
    ) -> PackedLinear:
        bias = None if bias is None else bias.float().contiguous()
        parts: Sequence[Any] = weight if isinstance(weight, Sequence) else [weight]
        options: dict[str, Any] = {"bias": 0 if bias is None else bias.data_ptr(), "gated": is_gated}
        activation_bits, first = 16, parts[0]
        if isinstance(first, QuantizedWeight):
            scheme, activation_bits = first.scheme, first.scheme.activation_bits
            code = _CODEBOOK if scheme.has_codebook else _NIBBLES if scheme.weight_bits == 4 else _BYTES
            options |= {"group": scheme.group_size, "scale_type": _SCALE_DTYPES[first.scales.dtype]}
            if first.codebook is not None:
                options["table"] = first.codebook.tolist()
            tensors: list[tuple[Any, ...]] = [(part.values, part.scales, part.zeros) for part in parts]
        else:
            code = _DTYPES[first.dtype]
            tensors = [(part, None, None) for part in parts]
        tensors = [tuple(None if item is None else item.contiguous() for item in part) for part in tensors]
        rows = [(len(part[0]), *(0 if item is None else item.data_ptr() for item in part)) for part in tensors]
        native = self._backend.pack(code, tensors[0][0].shape[1], rows, **options)
        if (found := self._backend.drop_zeros(native))[1]:  # measured now, for matrices with as many
            _log.info("kernels: %d %% zeros are left out if that is faster; it is %.2f times as fast", *found)
        return PackedLinear(torch.empty(0), native=native, is_gated=is_gated, activation_bits=activation_bits)

    def linear(
        self,
        packed: PackedLinear,
        x: Tensor,
        activation: str = "",
        residual: Tensor | None = None,
        is_wide: bool = False,
    ) -> Tensor:
        weight, x = packed.native, _dense(x)
        _need(x.shape[1] == weight.k, "the input of a linear")
        out = torch.empty(x.shape[0], weight.out_columns, dtype=torch.float32 if is_wide else x.dtype)
        if not x.shape[0]:
            return out
        if residual is not None:
            _need(residual.shape == out.shape, "the residual of a linear")
            residual = _dense(residual.to(out.dtype))
        self._backend.linear(
            weight, x.shape[0], x.data_ptr(), _DTYPES[x.dtype], x.stride(0),
            out.data_ptr(), _DTYPES[out.dtype], out.stride(0),
            _address(residual), 0 if residual is None else residual.stride(0),
            _activation_code(activation), packed.activation_bits == 8, *_adapter_arguments(packed.adapters, len(x)),
        )  # fmt: skip
        return out

    def allow_adapters(self, packed: PackedLinear, step: list[Tensor], num_slots: int) -> None:
        native = importlib.import_module("fastserve.kernels.cpu._native")
        packed.adapters = LinearAdapters(step, native=native.Adapters(packed.native, num_slots))

    def set_adapter(
        self, packed: PackedLinear, slot: int, weights: tuple[Tensor, Tensor] | None, dtype: torch.dtype
    ) -> None:
        assert packed.adapters is not None
        if weights is None:
            packed.adapters.native.clear(slot)
            return
        a, b = (item.float().contiguous() for item in weights)
        _need(a.shape == (b.shape[1], packed.native.k) and len(b) == packed.native.n, "an adapter")
        packed.adapters.native.set(slot, len(a), a.data_ptr(), b.data_ptr(), _DTYPES[dtype])

    def embed(
        self,
        table: Tensor | PackedLinear,
        ids: Tensor,
        dtype: torch.dtype,
        residual: Tensor | None = None,
        scale: float = 1.0,
    ) -> Tensor:
        packed = None if isinstance(table, Tensor) else table.native
        dense = table if isinstance(table, Tensor) else None if packed else table.weight
        out = torch.empty(ids.shape[0], packed.k if packed else dense.shape[1], dtype=dtype)  # type: ignore[union-attr]
        if out.numel():
            _need(ids.is_contiguous() and ids.dtype is torch.int64, "the ids of an embedding")
            _need(residual is None or (packed is None and _is_like(residual, out)), "the residual of an embedding")
            _need(dense is None or (dense.is_contiguous() and dense.dtype is dtype), "the table of an embedding")
            self._backend.gather(
                packed, _address(dense), _DTYPES[dtype], *out.shape, ids.data_ptr(), scale, _address(residual),
                out.data_ptr(),
            )  # fmt: skip
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None) -> Tensor:
        return self._norm(x, weight, None, epsilon, residual, centred=False)

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, residual: Tensor | None = None
    ) -> Tensor:
        return self._norm(x, weight, bias, epsilon, residual, centred=True)

    def _norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, residual: Tensor | None, centred: bool
    ) -> Tensor:
        _need(residual is None or _is_like(residual, x), "the residual of a norm")
        for part in (weight, bias):
            _need(part is None or (part.shape == x.shape[-1:] and part.dtype is x.dtype), "a norm's weight or bias")
        rows = _dense(x if x.dim() == 3 else x.reshape(-1, 1, x.shape[-1]))
        out = torch.empty(x.shape, dtype=x.dtype)
        if x.numel():
            self._backend.norm(
                rows.data_ptr(), _DTYPES[x.dtype], *rows.shape[:2], *rows.stride()[:2], x.shape[-1],
                weight.data_ptr(), _address(bias), out.data_ptr(), epsilon, centred, _address(residual),
            )  # fmt: skip
        return out

    def apply_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = _dense(x)
        cos, sin = cos.to(x.dtype).contiguous(), sin.to(x.dtype).contiguous()
        out = torch.empty(x.shape, dtype=x.dtype)
        if x.numel():
            self._backend.rope(
                x.data_ptr(), _DTYPES[x.dtype], *x.shape, x.stride(0), x.stride(1),
                cos.data_ptr(), sin.data_ptr(), cos.shape[-1], out.data_ptr(),
            )  # fmt: skip
        return out

    def store_kv(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slot_mapping: Tensor) -> None:
        key, value = _dense(key), _dense(value)
        if key.numel():
            self._backend.store(*_store_arguments(key, value, keys, values, slot_mapping))

    def transform_and_store(
        self, query: Tensor, key: Tensor, value: Tensor, how: HeadTransform, keys: Tensor, values: Tensor, slots: Tensor
    ) -> Tensor:
        query, key, value = _dense(query), _dense(key), _dense(value)
        out = torch.empty(query.shape, dtype=query.dtype)
        if not query.numel():
            return out
        _need(query.dtype is key.dtype and len(query) == len(key), "the query of a step")
        _need(how.cos is None or (how.cos.is_contiguous() and how.cos.dtype is torch.float32), "a rotation table")
        self._backend.heads(
            query.data_ptr(), query.shape[1], query.stride(0), query.stride(1),
            _address(how.query_norm), _address(how.key_norm), how.epsilon,
            _address(how.cos), _address(how.sin), 0 if how.cos is None else how.cos.shape[-1], how.positions.data_ptr(),
            out.data_ptr(), _store_arguments(key, value, keys, values, slots),
        )  # fmt: skip
        return out

    def paged_attention(
        self, query: Tensor, keys: Tensor, values: Tensor, batch: Batch, scores: Scores, of_source: bool = False
    ) -> Tensor:
        _need(keys.is_contiguous() and _is_like(values, keys), "the cache of attention")
        query = _dense(query)
        out = torch.empty(query.shape, dtype=query.dtype)
        tables, lengths = batch.block_tables, batch.context_lens
        if of_source:
            tables, lengths = batch.source_tables, batch.source_lens
        self._backend.attention(
            query.data_ptr(), _DTYPES[query.dtype], query.stride(0), query.stride(1), out.data_ptr(),
            query.shape[1], keys.shape[2], query.shape[2],
            keys.data_ptr(), values.data_ptr(), _CACHE_DTYPES[keys.dtype],
            keys.shape[1],
            batch.query_starts, lengths, tables,
            scores.scale, scores.softcap, scores.window, not of_source, *_bias_arguments(scores.bias),
        )  # fmt: skip
        return out

    def varlen_attention(
        self, query: Tensor, key: Tensor, value: Tensor, query_starts: list[int], key_starts: list[int], scores: Scores
    ) -> Tensor:
        assert not scores.softcap
        _need(query.dtype is key.dtype is value.dtype and key.shape == value.shape, "a key or value of attention")
        _need(query_starts[-1] <= len(query) and key_starts[-1] <= len(key), "a sequence's start")
        query, key, value = _dense(query), _dense(key), _dense(value)
        out = torch.empty(query.shape, dtype=query.dtype)
        if not query.numel():
            return out
        self._backend.varlen(
            query.data_ptr(), _DTYPES[query.dtype], query.stride(0), query.stride(1), out.data_ptr(),
            query.shape[1], key.shape[1], query.shape[2],
            key.data_ptr(), value.data_ptr(), key.stride()[:2], value.stride()[:2], query_starts, key_starts,
            scores.scale, scores.window, *_bias_arguments(scores.bias),
        )  # fmt: skip
        return out

    def argmax(self, logits: Tensor) -> Tensor:
        logits = _dense(logits)
        out = torch.empty(logits.shape[0], dtype=torch.int64)
        if logits.shape[0]:
            self._backend.argmax(
                logits.data_ptr(), _DTYPES[logits.dtype], *logits.shape, logits.stride(0), out.data_ptr()
            )
        return out

    def most_probable(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        _need(logits.dtype is torch.float32 and logits.stride(-1) == 1, "the logits")
        sums, values = torch.empty(len(logits), 1), torch.empty(len(logits), count)
        found = sums, values, torch.empty(len(logits), count, dtype=torch.int64)
        addresses = [tensor.data_ptr() for tensor in found]
        self._backend.most_probable(logits.data_ptr(), *logits.shape, logits.stride(0), count, *addresses)
        return found

    def copy_blocks(self, parts: list[Tensor], pairs: list[tuple[int, int]]) -> None:
        self._backend.copy_blocks([part.data_ptr() for part in parts], parts[0][0].nbytes, pairs)

    def record(self, network: Callable[[Kernels, Batch], Tensor], longest: int) -> RecordedStep | str:
        from fastserve.kernels.cpu.recording import record

        return record(self._backend, network, longest)

    def sample(self, logits: Tensor, rows: list[RowSampling]) -> list[int]:
        if logits.dtype not in _DTYPES or logits.stride(-1) != 1:
            logits = logits.float().contiguous()
        out = torch.empty(len(rows), dtype=torch.int64)
        if rows:
            self._backend.sample(
                logits.data_ptr(), _DTYPES[logits.dtype], *logits.shape, logits.stride(0), out.data_ptr(),
                [row.inverse_temperature for row in rows], [row.top_k for row in rows],
                [row.top_p for row in rows], [row.min_p for row in rows], [row.random for row in rows],
            )  # fmt: skip
        return out.tolist()


def _adapter_arguments(adapters: LinearAdapters | None, num_rows: int) -> tuple[Any, int]:
    return (None, 0) if adapters is None else (adapters.native, _address(adapters.slots(num_rows)))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _need(is_so: bool, what: str) -> None:
    if not is_so:  # else memory would be read or written that is another's
        raise ValueError(f"{what} has a shape, type or layout that does not fit")


def _is_like(x: Tensor, other: Tensor) -> bool:
    return x.is_contiguous() and x.dtype is other.dtype and x.shape == other.shape


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _bias_arguments(bias: Tensor | None) -> tuple[int, int, int]:
    """Address, width and the column of distance 0."""
    if bias is None:
        return 0, 0, 0
    _need(bias.is_contiguous() and bias.dtype is torch.float32, "the bias of attention")
    return bias.data_ptr(), bias.shape[1], bias.shape[1] // 2


def _store_arguments(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slot_mapping: Tensor) -> tuple[int, ...]:
    _need(key.dtype is value.dtype and key.shape == value.shape, "a value to be stored")
    heads = key.shape[1], key.shape[2] + 4 * (keys.dtype is torch.int8)  # a scale, too
    _need(keys.is_contiguous() and _is_like(values, keys) and keys.shape[2:] == heads, "the cache")
    slots_fit = slot_mapping.is_contiguous() and slot_mapping.dtype is torch.int64 and len(slot_mapping) == len(key)
    _need(slots_fit, "the list of slots")
    return (
        key.data_ptr(), value.data_ptr(), _DTYPES[key.dtype], _CACHE_DTYPES[keys.dtype], *key.shape,
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        keys.data_ptr(), values.data_ptr(), slot_mapping.data_ptr(), keys.shape[1],
    )  # fmt: skip


def _activation_code(activation: str) -> int:
    if activation not in _ACTIVATIONS:
        raise ConfigError(f"activation {activation!r} is not known; known: {', '.join(filter(None, _ACTIVATIONS))}")
    return _ACTIVATIONS[activation]


@functools.cache
def create(isa: str = "") -> CPUKernels:
    """The kernels of instruction set `isa` ("" takes the best that this machine has); one thread pool per process.

    Raises:
        ConfigError: `isa` is not available here; the library cannot be loaded, or not start its threads.
    """
    try:
        native = importlib.import_module("fastserve.kernels.cpu._native")
        available = native.available_isas()
        if isa and isa not in available:
            raise ConfigError(f"FASTSERVE_ISA={isa} is not available here; this machine has {', '.join(available)}")
        return CPUKernels(native.Backend(isa or available[-1], len(usable_cpus())))
    except ModuleNotFoundError:
        return CPUKernels(None)
    except (ImportError, RuntimeError) as error:
        raise ConfigError(f"the native library cannot be used: {error}; mend that, or set kernels=reference") from error
