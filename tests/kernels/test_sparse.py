"""Bfloat16 matrices of many zeros: whatever the library chose for them, the bits of the dense product."""

from __future__ import annotations

import logging

import pytest
import torch

from fastserve.kernels.cpu import create
from fastserve.kernels.interface import PackedLinear

KERNELS = create()
pytestmark = pytest.mark.skipif(KERNELS.native_backend is None, reason="the native library was not built")


def sparse(rows: int, columns: int, zeros: float) -> torch.Tensor:
    draw = torch.Generator().manual_seed(rows)
    values = torch.randn(rows, columns, generator=draw).bfloat16()
    return values * (torch.rand(rows, columns, generator=draw) >= zeros)


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_dense_matrix(dtype: torch.dtype, is_gated: bool) -> None:
    weight = sparse(160, 448, 0.8)
    packed = KERNELS.pack_linear([weight[:80], weight[80:]], None, is_gated)
    native = KERNELS.native_backend.pack(1, 448, [(160, weight.data_ptr(), 0, 0)], gated=is_gated)
    dense = PackedLinear(torch.empty(0), native=native, is_gated=is_gated)
    for rows in (1, 2, 9, 70):
        x = torch.randn(rows, 448).to(dtype)
        activation = "silu" if is_gated else ""
        assert torch.equal(KERNELS.linear(packed, x, activation), KERNELS.linear(dense, x, activation))
    both = torch.empty(2, 160, 448)
    native.unpack(both[0].data_ptr())
    packed.native.unpack(both[1].data_ptr())
    assert torch.equal(*both) and torch.equal(both[0], weight.float())


def test_the_choice_is_measured_once_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fastserve.kernels.cpu.kernels"):
        matrices = [KERNELS.pack_linear(sparse(128, 256, 0.9), None) for _ in range(3)]
    assert len([line for line in caplog.messages if "of a matrix is zero" in line]) == 1
    dense = KERNELS.pack_linear(sparse(128, 256, 0.2), None)
    is_short = "without them" in caplog.messages[0]
    assert all((item.num_bytes < 0.4 * dense.num_bytes) == is_short for item in matrices)
