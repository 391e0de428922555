"""LoRA adapters of one model: loaded and unloaded while it serves, any of them in one batch.

Each linear has a slot per adapter (`kernels/interface.py:LinearAdapters`); a step's rows say whose slot is theirs. A
merged linear (queries, keys and values, say) holds the matrices of its modules as one pair: A's below each other, B's
on the diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastserve.checkpoint.adapter import read_adapter
from fastserve.core.errors import CheckpointError, ConfigError, RequestError
from fastserve.kernels.reference import Kernels
from fastserve.models.parameters import LinearPart

_Pairs = dict[str, tuple[Tensor, Tensor]]


class Adapters:
    """Slots and the adapters in them.

    Args:
        linears: module -> its part of a linear; see `LoadedModel.linears`.
        dtype: in which adapters are kept.
        max_loras: slots; 0: none can be loaded.

    Attributes:
        step: what the linears read a step's slots from; see `LinearAdapters.step`.
    """

    def __init__(
        self, linears: Mapping[str, LinearPart], kernels: Kernels, dtype: torch.dtype, max_loras: int, max_rank: int
    ) -> None:
        if max_loras and not linears:
            raise ConfigError("LoRA adapters need a model that FastServe computes itself; leave out lora and max_loras")
        self.step: list[Tensor] = []
        self._linears = linears
        self._kernels = kernels
        self._dtype = dtype
        self._max_rank = max_rank
        self._free = list(range(max_loras))[::-1]
        self._slots: dict[str, int] = {}  # by key
        self._keys: dict[str, str] = {}  # by name
        self._num_loaded = 0
        if max_loras:
            for part in linears.values():
                if part.packed.adapters is None:
                    kernels.allow_adapters(part.packed, self.step, max_loras)

    def key(self, name: str) -> str:
        """What requests carry inside the engine: another one when the name is given to another adapter later.

        Raises:
            RequestError: no such adapter.
        """
        if name not in self._keys:
            raise RequestError(f"there is no adapter {name!r} here", "model")
        return self._keys[name]

    def slot(self, key: str) -> int:
        """Where the adapter of a key is; -1 for "", no adapter."""
        return self._slots[key] if key else -1

    def load(self, name: str, path: str) -> None:
        """Read a folder and put it into a slot.

        Raises:
            RequestError: the name is taken, no slot is free, or the folder does not fit this model; nothing changed.
        """
        if name in self._keys:
            raise RequestError(
                f"there is an adapter {name!r} already; unload it first, or take another name", "lora_name"
            )
        if not self._free:
            raise RequestError(
                f"{len(self._slots)} adapters are loaded, which is as many as may be (max_loras); unload one, or start "
                "with a larger max_loras",
                "lora_name",
            )
        try:
            pairs = self._match(read_adapter(path))
        except CheckpointError as error:
            raise RequestError(str(error), "lora_path") from error
        slot = self._free.pop()
        merged: dict[int, list[str]] = {}
        for module in pairs:
            merged.setdefault(id(self._linears[module].packed), []).append(module)
        for modules in merged.values():
            self._kernels.set_adapter(self._linears[modules[0]].packed, slot, self._merge(modules, pairs), self._dtype)
        self._num_loaded += 1
        self._keys[name] = key = f"{name}#{self._num_loaded}"
        self._slots[key] = slot

    def unload(self, name: str) -> None:
        """Empty the slot of an adapter that no sequence uses."""
        slot = self._slots.pop(self._keys.pop(name))
        for packed in {id(part.packed): part.packed for part in self._linears.values()}.values():
            self._kernels.set_adapter(packed, slot, None, self._dtype)
        self._free.append(slot)

    def _match(self, pairs: _Pairs) -> _Pairs:
        """The pairs by our names of the modules."""
        found: _Pairs = {}
        for name, (a, b) in pairs.items():
            # The longest end of the name that we know; adapters may have been made on a model inside another one.
            parts = name.split(".")
            ends = (".".join(parts[first:]) for first in range(len(parts)))
            module = next((end for end in ends if end in self._linears), None)
            if module is None:
                raise CheckpointError(
                    f"the adapter changes {name}, which is no linear layer of this model that can be adapted"
                )
            part = self._linears[module]
            if a.shape[1] != part.num_inputs or b.shape[0] != part.num_rows:
                raise CheckpointError(
                    f"the adapter's {name} is made for {a.shape[1]} inputs and {b.shape[0]} outputs, the model's has "
                    f"{part.num_inputs} and {part.num_rows}; they do not belong together"
                )
            if len(a) > self._max_rank:
                raise CheckpointError(
                    f"the adapter's {name} has rank {len(a)}; at most {self._max_rank} (max_lora_rank)"
                )
            found[module] = (a, b)
        if not found:
            raise CheckpointError("the adapter has no matrices")
        return found

    def _merge(self, modules: list[str], pairs: _Pairs) -> tuple[Tensor, Tensor]:
        """A [R, K] and B [N, R] of one linear from those of its modules; R is the sum of their ranks."""
        all_rows = self._linears[modules[0]].all_rows
        merged = torch.zeros(all_rows, sum(len(pairs[module][0]) for module in modules))
        first = 0
        for module in modules:
            part, (a, b) = self._linears[module], pairs[module]
            rows = slice(part.first, part.first + part.num_rows)
            merged[rows, first : first + len(a)] = b if part.order is None else b[part.order]
            first += len(a)
        return torch.cat([pairs[module][0] for module in modules]), merged
