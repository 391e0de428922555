"""Matrices of which many values are zero, on disk: a bit for each place and the values that are not zero.

The form of compressed-tensors' `sparse-bitmask`: per module `compressed` (the values, row by row), `bitmask` ([N, K/8]
uint8, the first place in the lowest bit), `row_offsets` ([N], where a row's values begin) and `shape`. N rows, K
columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastserve.checkpoint.weights import WeightReader
from fastserve.core.errors import CheckpointError

FORMAT = "sparse-bitmask"
_BITS = torch.arange(8, dtype=torch.uint8)


def pack(module: str, weight: Tensor) -> dict[str, Tensor]:
    """Name -> tensor for the matrix [N, K] of a module."""
    kept = weight != 0
    bits = torch.nn.functional.pad(kept, (0, -weight.shape[1] % 8)).view(len(weight), -1, 8)
    counts = kept.sum(1)
    found = {
        "compressed": weight[kept],
        "bitmask": (bits.to(torch.uint8) << _BITS).sum(-1, dtype=torch.uint8),
        "row_offsets": counts.cumsum(0) - counts,
        "shape": torch.tensor(weight.shape),
    }
    return {f"{module}.{suffix}": tensor for suffix, tensor in found.items()}


def packed_bytes(weight: Tensor) -> int:
    """What `pack` makes of a matrix, in bytes."""
    return int((weight != 0).sum()) * weight.itemsize + len(weight) * (-(-weight.shape[1] // 8) + 8) + 16


def read(reader: WeightReader, module: str, shape: tuple[int, int]) -> Tensor:
    """The matrix [N, K] of a module, of the type in which its values lie.

    Raises:
        CheckpointError: a tensor is missing or of another shape, or the mask has another number of bits than values.
    """
    masks = reader.view(f"{module}.bitmask", (shape[0], -(-shape[1] // 8)))
    values = reader.view(f"{module}.compressed", reader.shape(f"{module}.compressed"))
    if masks.dtype is not torch.uint8 or values.dim() != 1 or not values.is_floating_point():
        raise CheckpointError(f"{module} has a bitmask or values of a type that {FORMAT} does not have")
    kept = ((masks.unsqueeze(-1) >> _BITS) & 1).view(shape[0], -1)[:, : shape[1]].bool()
    if int(kept.sum()) != len(values):
        raise CheckpointError(f"{module} is damaged: {len(values)} values, but {int(kept.sum())} bits in its mask")
    weight = torch.zeros(shape, dtype=values.dtype)
    weight[kept] = values
    return weight


def config(zeros: float) -> dict[str, Any]:
    """The `quantization_config` of a folder with such matrices; zeros: their share among all of its weights."""
    sparsity = {"format": FORMAT, "sparsity_structure": "unstructured", "global_sparsity": zeros}
    return {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "quantization_status": "compressed",
        "config_groups": {},
        "ignore": [],
        "sparsity_config": {**sparsity, "targets": ["Linear"], "ignore": []},
    }
