"""Matrices of low rank on disk: two thin factors whose product the matrix is.

A form of our own, which is multiplied out when it is read. Its weights.type in config.json is "factors", at which other
programs stop. Per module `left_factor` [N, R] and `right_factor` [R, K], of the type that the weights have. N rows, K
columns, rank R.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastserve.checkpoint.quantization import FACTORS_FORMAT
from fastserve.checkpoint.weights import WeightReader
from fastserve.core.errors import CheckpointError


def pack(module: str, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """Name -> tensor for the factors [N, R] and [R, K] of a module."""
    return {f"{module}.left_factor": left, f"{module}.right_factor": right}


def product(left: Tensor, right: Tensor) -> Tensor:
    """The matrix [N, K], of the factors' type."""
    return (left.float() @ right.float()).to(left.dtype)


def read(reader: WeightReader, module: str, shape: tuple[int, int]) -> Tensor:
    """The matrix [N, K] of a module.

    Raises:
        CheckpointError: a factor is missing, or their shapes or types do not go together.
    """
    name = f"{module}.left_factor"
    rank = reader.shape(name)[-1] if reader.shape(name) else 0
    left = reader.view(name, (shape[0], rank))
    right = reader.view(f"{module}.right_factor", (rank, shape[1]))
    if left.dtype is not right.dtype or left.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise CheckpointError(
            f"{module} has factors of types {left.dtype} and {right.dtype}; {FACTORS_FORMAT} has floats alike"
        )
    return product(left, right)


def config() -> dict[str, Any]:
    """The `quantization_config` of a folder with such matrices; those that have no factors are as they were."""
    weights = {"num_bits": 16, "type": "factors", "symmetric": True, "strategy": "tensor"}
    return {
        "quant_method": "compressed-tensors",
        "format": FACTORS_FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": FACTORS_FORMAT}},
        "ignore": [],
    }
