"""The operations over the native library: C++ gets addresses, shapes and strides of torch's tensors, nothing is copied.

What the library does not speed up is inherited from the reference. Tensors are float32 or bfloat16 on the CPU; a last
dimension is contiguous, rows may be strided. Every operation gives a row the same bits whatever else is in the batch.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastserve.core.errors import ConfigError
from fastserve.kernels.cpu.threads import usable_cpus
from fastserve.kernels.interface import Batch, KernelSpec, PackedLinear, Weight
from fastserve.kernels.quant import QuantizedWeight
from fastserve.kernels.reference import ReferenceKernels

# Numbers of the enumerations in csrc/common.h and csrc/packed_weight.h.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_SCALE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ACTIVATIONS = {"": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}
_BYTES, _NIBBLES, _CODEBOOK = 2, 3, 4


class CPUKernels(ReferenceKernels):
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
            tensors = [(part.values, part.scales, part.zeros) for part in parts]
        else:
            code = _DTYPES[first.dtype]
            tensors = [(part, None, None) for part in parts]
        tensors = [tuple(None if item is None else item.contiguous() for item in part) for part in tensors]
        rows = [(len(part[0]), *(0 if item is None else item.data_ptr() for item in part)) for part in tensors]
        native = self._backend.pack(code, tensors[0][0].shape[1], rows, **options)
        return PackedLinear(torch.empty(0), native=native, is_gated=is_gated, activation_bits=activation_bits)

    def embedding(self, table: PackedLinear, ids: Tensor, dtype: torch.dtype) -> Tensor:
        if table.native is None:
            return super().embedding(table, ids, dtype)
        out, ids = torch.empty(len(ids), table.native.k, dtype=dtype), ids.contiguous()
        if len(ids):
            self._backend.look_up(table.native, ids.data_ptr(), len(ids), out.data_ptr(), _DTYPES[dtype])
        return out

    def linear(self, packed: PackedLinear, x: Tensor, activation: str = "", residual: Tensor | None = None) -> Tensor:
        weight = packed.native
        if x.stride(-1) != 1:
            x = x.contiguous()
        out = torch.empty(x.shape[0], weight.out_columns, dtype=x.dtype)
        if not x.shape[0]:
            return out
        dtype = _DTYPES[x.dtype]
        if residual is not None and (residual.stride(-1) != 1 or residual.dtype != x.dtype):
            residual = residual.to(x.dtype).contiguous()
        self._backend.linear(
            weight,
            x.shape[0],
            x.data_ptr(),
            dtype,
            x.stride(0),
            out.data_ptr(),
            dtype,
            out.stride(0),
            0 if residual is None else residual.data_ptr(),
            0 if residual is None else residual.stride(0),
            _activation_code(activation),
            packed.activation_bits == 8,
        )
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        return self._norm(x, weight, None, epsilon, subtract_mean=False)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
        return self._norm(x, weight, bias, epsilon, subtract_mean=True)

    def _norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float, subtract_mean: bool) -> Tensor:
        if x.dim() > 3 or x.stride(-1) != 1:
            x = x.contiguous()
        if x.dim() > 3 or x.dim() < 2:
            return self._norm(x.view(-1, x.shape[-1]), weight, bias, epsilon, subtract_mean).view(x.shape)
        out = torch.empty(x.shape, dtype=x.dtype)
        if not x.numel():
            return out
        outer, inner = (x.shape[0], 1) if x.dim() == 2 else x.shape[:2]
        inner_stride = 0 if x.dim() == 2 else x.stride(1)
        self._backend.norm(
            x.data_ptr(), _DTYPES[x.dtype], outer, inner, x.stride(0), inner_stride, x.shape[-1],
            weight.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr(), epsilon, subtract_mean,
        )  # fmt: skip
        return out

    def apply_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if x.stride(-1) != 1:
            x = x.contiguous()
        cos, sin = cos.to(x.dtype).contiguous(), sin.to(x.dtype).contiguous()
        out = torch.empty(x.shape, dtype=x.dtype)
        if x.numel():
            self._backend.rope(
                x.data_ptr(), _DTYPES[x.dtype], *x.shape, x.stride(0), x.stride(1),
                cos.data_ptr(), sin.data_ptr(), cos.shape[-1], out.data_ptr(),
            )  # fmt: skip
        return out

    def gated_activation(self, x: Tensor, activation: str) -> Tensor:
        return self._activation(x, activation, is_gated=True)

    def activation(self, x: Tensor, activation: str) -> Tensor:
        return self._activation(x, activation, is_gated=False)

    def _activation(self, x: Tensor, activation: str, is_gated: bool) -> Tensor:
        if x.dim() != 2 or x.stride(-1) != 1:
            return self._activation(x.reshape(-1, x.shape[-1]).contiguous(), activation, is_gated).view(
                *x.shape[:-1], -1
            )
        size = x.shape[-1] // 2 if is_gated else x.shape[-1]
        out = torch.empty(x.shape[0], size, dtype=x.dtype)
        if out.numel():
            code = _activation_code(activation)
            self._backend.activation(
                x.data_ptr(), _DTYPES[x.dtype], x.shape[0], size, x.stride(0), out.data_ptr(), code, is_gated
            )
        return out

    def store_kv(self, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slot_mapping: Tensor) -> None:
        if not key.numel():
            return
        assert keys.is_contiguous() and values.is_contiguous() and slot_mapping.is_contiguous()
        if key.stride(-1) != 1:
            key = key.contiguous()
        if value.stride(-1) != 1:
            value = value.contiguous()
        self._backend.store(
            key.data_ptr(), value.data_ptr(), _DTYPES[key.dtype], _DTYPES[keys.dtype], *key.shape,
            key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            keys.data_ptr(), values.data_ptr(), slot_mapping.data_ptr(),
        )  # fmt: skip

    def paged_attention(
        self, query: Tensor, keys: Tensor, values: Tensor, batch: Batch, scale: float, window: int, softcap: float
    ) -> Tensor:
        if query.stride(-1) != 1:
            query = query.contiguous()
        out = torch.empty(query.shape, dtype=query.dtype)
        tables = [table.contiguous() for table in batch.block_tables]
        self._backend.attention(
            query.data_ptr(), _DTYPES[query.dtype], query.stride(0), query.stride(1), out.data_ptr(),
            query.shape[1], keys.shape[2], query.shape[2], keys.data_ptr(), values.data_ptr(), _DTYPES[keys.dtype],
            _cache_strides(keys), _cache_strides(values), keys.shape[1],
            batch.query_starts, batch.context_lens, [table.data_ptr() for table in tables],
            scale, softcap, window, True,
        )  # fmt: skip
        return out

    def argmax(self, logits: Tensor) -> Tensor:
        """Index of the largest of each row of logits [R, V], the first among equals: [R] int64."""
        if logits.stride(-1) != 1:
            logits = logits.contiguous()
        out = torch.empty(logits.shape[0], dtype=torch.int64)
        if logits.shape[0]:
            self._backend.argmax(
                logits.data_ptr(), _DTYPES[logits.dtype], *logits.shape, logits.stride(0), out.data_ptr()
            )
        return out


def _activation_code(activation: str) -> int:
    if activation not in _ACTIVATIONS:
        raise ConfigError(f"activation {activation!r} is not known; known: {', '.join(filter(None, _ACTIVATIONS))}")
    return _ACTIVATIONS[activation]


def _cache_strides(cache: Tensor) -> list[int]:
    assert cache.stride(-1) == 1, "the last dimension of a cache is contiguous"
    return [cache.stride(0), cache.stride(1), cache.stride(2)]


@functools.cache
def create(isa: str = "") -> CPUKernels:
    """The kernels of instruction set `isa` ("" takes the best that this machine has); one thread pool per process.

    Raises:
        ConfigError: `isa` is not available here.
    """
    try:
        native = importlib.import_module("fastserve.kernels.cpu._native")
    except ImportError:
        return CPUKernels(None)
    available = native.available_isas()
    if isa and isa not in available:
        raise ConfigError(f"FASTSERVE_ISA={isa} is not available here; this machine has {', '.join(available)}")
    return CPUKernels(native.Backend(isa or available[-1], len(usable_cpus())))
