"""Fills a network's parameters from a model folder, by role instead of by name.

A family's table says what the tensors are called (`families.py`); a network asks for "query" or "mlp_norm" of a layer
(`layers.py`). A matrix is packed for the kernels straight from the mapped file, from several tensors where it is a
merged one, quantised or not; then its pages are given back. What the next layer needs is fetched meanwhile.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastserve.checkpoint.quantization import KV_CACHE_SCALES, Quantization, QuantizedFormat
from fastserve.checkpoint.quantized import QuantizedWeight, is_empty_bias, read_quantized
from fastserve.checkpoint.weights import WeightReader
from fastserve.core.errors import CheckpointError
from fastserve.kernels.interface import PackedLinear, Weight
from fastserve.kernels.quant import quantize_rows, reordered
from fastserve.kernels.reference import Kernels
from fastserve.models.model import ModelShape, same_fields

_OLD_SUFFIXES = {"weight": "gamma", "bias": "beta"}  # of norms, in folders made of TensorFlow checkpoints


@dataclass(frozen=True, slots=True)
class LinearPart:
    """Where a module's matrix went: rows first .. first + num_rows of a packed one, which has `all_rows`.

    order: which of the module's rows comes where; None: as they are.
    """

    packed: PackedLinear
    first: int
    num_rows: int
    all_rows: int
    num_inputs: int
    order: Tensor | None


@dataclass(eq=False)
class ParameterLoader:
    """Parameters by role, for one network.

    Attributes:
        reader: the folder's tensors.
        names: role -> module name on disk, with {layer} where it belongs.
        transposed: roles whose weight lies on disk as [in, out].
        kernels, dtype, device: how and where the parameters live.
        quantization: which modules are quantised, and how; None: none.
        to_int8: quantise matrices of layers that are not (`quantize_rows`), as they are loaded.
        linears: module -> the part of a linear that it became, but for embeddings, heads and experts.
    """

    reader: WeightReader
    names: Mapping[str, str]
    transposed: frozenset[str]
    kernels: Kernels
    dtype: torch.dtype
    device: torch.device
    quantization: Quantization | None = None
    to_int8: bool = False
    linears: dict[str, LinearPart] = field(default_factory=dict, init=False)
    # What was seen so far, by all loaders for parts of the network.
    _loaded: Counter[str] = field(default_factory=Counter, init=False)
    _used: set[str] = field(default_factory=set, init=False)
    _missing: list[str] = field(default_factory=list, init=False)

    def of_expert(self, expert: int) -> ParameterLoader:
        """This loader for one of a layer's experts: the names' {expert} is its number."""
        return self.with_names({role: name.replace("{expert}", str(expert)) for role, name in self.names.items()})

    def with_names(self, names: Mapping[str, str]) -> ParameterLoader:
        """This loader for another part of the network."""
        other = copy.copy(self)
        other.linears, other.names = {}, names
        return other

    def has_role(self, role: str) -> bool:
        """Whether the family stores this role as a module of its own."""
        return role in self.names

    def tensor(self, role: str, shape: tuple[int, ...], layer: int = 0, suffix: str = "weight") -> Tensor:
        """One tensor in the compute precision, such as a norm's weight; suffix "": the role names it whole."""
        target = torch.empty(shape, dtype=self.dtype, device=self.device)
        name = f"{self._module(role, layer)}.{suffix}" if suffix else self._module(role, layer)
        old_name = f"{self._module(role, layer)}.{_OLD_SUFFIXES.get(suffix, suffix)}"
        if name not in self.reader and old_name in self.reader:
            name = old_name
        if self._find(name):
            self.reader.read_into(name, target)
        self._count(target.numel(), target.nbytes)
        return target

    def embedding_and_head(
        self, num_rows: int, size: int, is_tied: bool, bias: bool
    ) -> tuple[PackedLinear, PackedLinear]:
        """The table of the tokens' vectors, for `Kernels.embed`, and the output projection; one object when tied.

        A folder may tie them and have the head once more, quantised: they are two then.
        """
        head_format = self._format("head", 0, "Linear")
        if is_tied and (head_format is None or f"{self._module('head', 0)}.{head_format.marker}" not in self.reader):
            table = self.linear({"embedding": num_rows}, size, bias=False)
            return table, table
        if self._format("embedding", 0, "Embedding"):
            table = self.linear({"embedding": num_rows}, size, bias=False)
        else:
            table = PackedLinear(self.tensor("embedding", (num_rows, size)))
        return table, self.linear({"head": num_rows}, size, bias)

    def linear(
        self,
        parts: Mapping[str, int],
        num_inputs: int,
        bias: bool | Tensor,
        layer: int = 0,
        *,
        is_gated: bool = False,
        order: Tensor | None = None,
    ) -> PackedLinear:
        """One merged linear: role -> number of its output rows, in order; packed for the kernels.

        bias: whether the parts have one each on disk; or the whole. is_gated: the parts are gate and up, in this order.
        order: which row of a single part comes where; None: as they are.
        """
        for role in parts:
            self._prefetch(role, layer + 1)
        weights: Tensor | list[Weight]
        if all(self._must_convert(role, layer) for role in parts):
            weights = self._converted(parts, num_inputs, layer)
        else:
            weights = [self._weight(role, (num_rows, num_inputs), layer) for role, num_rows in parts.items()]
            _check_alike([self._module(role, layer) for role in parts], weights)
        if self.to_int8 and "router" not in parts and "{layer}" in self.names[next(iter(parts))]:
            given = weights if isinstance(weights, list) else [weights]
            weights = [quantize_rows(part) if isinstance(part, Tensor) else part for part in given]
        merged_bias = bias if isinstance(bias, Tensor) else None
        if bias is True:
            merged_bias = torch.cat([self.tensor(role, (rows,), layer, "bias") for role, rows in parts.items()])
        if order is not None and len(parts) == 1:
            [weight] = weights if isinstance(weights, list) else [weights]
            weights = [reordered(weight, order)]
            merged_bias = None if merged_bias is None else merged_bias[order]
        packed = self.kernels.pack_linear(weights, merged_bias, is_gated)
        self._count(sum(parts.values()) * num_inputs, packed.num_bytes)
        del weights
        first, all_rows = 0, sum(parts.values())
        for role, num_rows in parts.items():
            self._release(role, layer)
            if role not in ("embedding", "head"):
                part = LinearPart(packed, first, num_rows, all_rows, num_inputs, order if len(parts) == 1 else None)
                self.linears[self._module(role, layer)] = part
            first += num_rows
        return packed

    def shape(self, config: Any, num_kv_heads: int) -> ModelShape:
        """Of a network of our own, by its config, once all of it is loaded."""
        known = {**same_fields(config, ModelShape), **self._loaded, "num_kv_heads": num_kv_heads}
        return ModelShape(**known, dtype=self.dtype)

    def finish(self, ignored: tuple[str, ...]) -> None:
        """Check that every tensor was found and none is left over, but for names that match an `ignored` pattern.

        Raises:
            CheckpointError: missing or unexpected tensors, by name.
        """
        if self._missing:
            raise CheckpointError(f"the model folder lacks {_listed(self._missing)}; is it complete?")
        known = re.compile("|".join((*ignored, KV_CACHE_SCALES)))
        left = [name for name in self.reader.names() if name not in self._used and not known.fullmatch(name)]
        left = [name for name in left if not is_empty_bias(self.reader, name)]
        if left:
            raise CheckpointError(
                f"the model folder has {_listed(left)} that its config does not account for; check config.json, or let "
                "transformers run it with backend=transformers"
            )

    def _must_convert(self, role: str, layer: int) -> bool:
        """Whether a matrix that is not quantised lies on disk in another form than it is packed from."""
        name = f"{self._module(role, layer)}.weight"
        if self._format(role, layer, "Embedding" if role == "embedding" else "Linear") is not None:
            return False
        is_ready = name in self.reader and self.reader.dtype(name) is self.dtype and self.device.type == "cpu"
        return role in self.transposed or not is_ready

    def _converted(self, parts: Mapping[str, int], num_inputs: int, layer: int) -> Tensor:
        """Matrices in the compute precision below each other; pages of the file are given back meanwhile."""
        merged = torch.empty((sum(parts.values()), num_inputs), dtype=self.dtype, device=self.device)
        for role, rows in zip(parts, merged.split(list(parts.values())), strict=True):
            name = f"{self._module(role, layer)}.weight"
            if self._find(name):
                self.reader.read_into(name, rows.t() if role in self.transposed else rows)
        return merged

    def _weight(self, role: str, shape: tuple[int, int], layer: int) -> Weight:
        """A quantised matrix, or one in the compute precision, as a view of the file where it lies there so."""
        module = self._module(role, layer)
        layout = self._format(role, layer, "Embedding" if role == "embedding" else "Linear")
        weight: Weight
        if layout is None:
            name = f"{module}.weight"
            weight = self.reader.view(name, shape) if self._find(name) else torch.empty(shape)
        elif role in self.transposed:
            raise CheckpointError(f"{module} is quantised and transposed; no scheme of this kind is supported")
        else:
            self._used.update(name for name in self.reader.names_of(module) if not name.endswith(".bias"))
            weight = read_quantized(self.reader, module, shape, layout)
        return weight.to(self.dtype) if isinstance(weight, Tensor) else weight

    def _format(self, role: str, layer: int, class_name: str) -> QuantizedFormat | None:
        """How the module is quantised; None when it was left as it was, whatever the config says of others."""
        if self.quantization is None or role not in self.names:
            return None
        module = self._module(role, layer)
        layout = self.quantization.format_of(module, class_name)
        return layout if layout is not None and f"{module}.{layout.marker}" in self.reader else None

    def _module(self, role: str, layer: int) -> str:
        return self.names[role].format(layer=layer)

    def _find(self, name: str) -> bool:
        (self._used.add if name in self.reader else self._missing.append)(name)
        return name in self.reader

    def _prefetch(self, role: str, layer: int) -> None:
        for name in self.reader.names_of(self._module(role, layer)):
            self.reader.prefetch(name)

    def _release(self, role: str, layer: int) -> None:
        for name in self.reader.names_of(self._module(role, layer)):
            self.reader.release(name)

    def _count(self, num_parameters: int, num_bytes: int) -> None:
        self._loaded.update(num_parameters=num_parameters, weight_bytes=num_bytes)


def _check_alike(modules: list[str], weights: list[Weight]) -> None:
    kinds = set()
    for weight in weights:
        kind: tuple[object, ...] = ()
        if isinstance(weight, QuantizedWeight):
            levels = None if weight.codebook is None else tuple(weight.codebook.tolist())
            kind = (weight.scheme, weight.scales.dtype, levels)
        kinds.add(kind)
    if len(kinds) > 1:
        raise CheckpointError(
            f"{', '.join(modules)} are served as one matrix, but are quantised in different ways; quantise them alike"
        )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"tensor{'s' if len(names) > 1 else ''} {shown}{more}"
