"""The operations over the native library: hands addresses, shapes and strides of torch's tensors to C++, copies nothing.

What the library does not speed up is inherited from the reference. Tensors are float32 or bfloat16 on the CPU; a last
dimension is contiguous, rows may be strided. Every operation gives a row the same bits whatever else is in the batch.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from fastserve.core.errors import ConfigError
from fastserve.kernels.cpu.threads import usable_cpus
from fastserve.kernels.interface import KernelSpec, PackedLinear
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
        self, weight: Tensor | QuantizedWeight, bias: Tensor | None, is_gated: bool = False
    ) -> PackedLinear:
        bias = None if bias is None else bias.float().contiguous()
        options: dict[str, Any] = {"bias": 0 if bias is None else bias.data_ptr(), "gated": is_gated}
        activation_bits = 16
        if isinstance(weight, QuantizedWeight):
            values, scheme = weight.values.contiguous(), weight.scheme
            scales = weight.scales.contiguous()
            zeros = None if weight.zeros is None else weight.zeros.contiguous()
            code = _CODEBOOK if scheme.has_codebook else _NIBBLES if scheme.weight_bits == 4 else _BYTES
            activation_bits = scheme.activation_bits
            options |= {"group": scheme.group_size, "scales": scales.data_ptr()}
            options |= {"scale_type": _SCALE_DTYPES[scales.dtype], "zeros": 0 if zeros is None else zeros.data_ptr()}
            if weight.codebook is not None:
                options["table"] = weight.codebook.tolist()
        else:
            values, code = weight.contiguous(), _DTYPES[weight.dtype]
        num_outputs, num_inputs = values.shape
        native = self._backend.pack(code, values.data_ptr(), num_outputs, num_inputs, num_inputs, **options)
        return PackedLinear(
            values.new_empty(0), native=native, is_gated=is_gated, activation_bits=activation_bits
        )

    def linear(
        self, packed: PackedLinear, x: Tensor, activation: str = "", residual: Tensor | None = None
    ) -> Tensor:
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
            _ACTIVATIONS[activation],
            packed.activation_bits == 8,
        )
        return out


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
