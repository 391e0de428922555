"""Fills a network's parameters from a model folder, by role instead of by name.

A family's table says what the tensors are called (`families.py`); a network asks for "query" or "mlp_norm" of a layer
(`layers.py`). Parameters are allocated in their final type and place, several tensors are read into slices of one
merged matrix, and each matrix is packed for the kernels as soon as it is complete.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fastserve.checkpoint.weights import WeightReader
from fastserve.core.errors import CheckpointError
from fastserve.kernels.interface import Kernels, PackedLinear


class ParameterLoader:
    """Parameters by role, for one network.

    Args:
        reader: the folder's tensors.
        names: role -> module name on disk, with {layer} where it belongs.
        transposed: roles whose weight lies on disk as [in, out].
        kernels, dtype, device: how and where the parameters live.
    """

    def __init__(
        self,
        reader: WeightReader,
        names: Mapping[str, str],
        transposed: frozenset[str],
        kernels: Kernels,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.kernels = kernels
        self.dtype = dtype
        self.device = device
        self.num_parameters = 0
        self._reader = reader
        self._names = names
        self._transposed = transposed
        self._used: set[str] = set()
        self._missing: list[str] = []

    def has_role(self, role: str) -> bool:
        """Whether the family stores this role as a module of its own."""
        return role in self._names

    def tensor(self, role: str, shape: tuple[int, ...], layer: int = 0, suffix: str = "weight") -> Tensor:
        """One tensor as it is on disk, such as an embedding or a norm's weight."""
        target = self._allocate(shape)
        self._fill(target, role, layer, suffix)
        return target

    def linear(
        self, parts: Mapping[str, int], num_inputs: int, bias: bool, layer: int = 0, is_gated: bool = False
    ) -> PackedLinear:
        """One merged linear: role -> number of its output rows, in order; packed for the kernels.

        is_gated: the parts are gate and up, in this order.
        """
        num_outputs = sum(parts.values())
        weight = self._allocate((num_outputs, num_inputs))
        merged_bias = self._allocate((num_outputs,)) if bias else None
        first = 0
        for role, num_rows in parts.items():
            rows = weight[first : first + num_rows]
            self._fill(rows.t() if role in self._transposed else rows, role, layer, "weight")
            if merged_bias is not None:
                self._fill(merged_bias[first : first + num_rows], role, layer, "bias")
            first += num_rows
        return self.kernels.pack_linear(weight, merged_bias, is_gated)

    def finish(self, ignored: tuple[str, ...]) -> None:
        """Check that every tensor was found and none is left over, but for names that match an `ignored` pattern.

        Raises:
            CheckpointError: missing or unexpected tensors, by name.
        """
        if self._missing:
            raise CheckpointError(f"the model folder lacks {_listed(self._missing)}; is it complete?")
        left = [name for name in self._reader.names() if name not in self._used]
        left = [name for name in left if not any(re.fullmatch(pattern, name) for pattern in ignored)]
        if left:
            raise CheckpointError(
                f"the model folder has {_listed(left)} that its config does not account for; check config.json, or let "
                "transformers run it with backend=transformers"
            )

    def _allocate(self, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.num_parameters += tensor.numel()
        return tensor

    def _fill(self, target: Tensor, role: str, layer: int, suffix: str) -> None:
        name = f"{self._names[role].format(layer=layer)}.{suffix}"
        if name not in self._reader:
            self._missing.append(name)
            return
        self._reader.read_into(name, target)
        self._used.add(name)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {shown}{more}"
