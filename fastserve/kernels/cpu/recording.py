"""A network as one native plan: run once on a probe step whose operations the library writes down, then in one call.

The network is the same code that runs operation by operation; its kernels here are `CPUKernels` over a recording in
place of the backend. So that nothing is missed, PyTorch may only make empty tensors and views meanwhile: whatever else
the network asks of it (a sum, a conversion) ends the recording, and the reason says which. Addresses that are not in
one of those tensors are constants: weights, rotation tables, caches.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastserve.kernels.cpu.kernels import CPUKernels
from fastserve.kernels.interface import Batch, RecordedStep
from fastserve.kernels.reference import Kernels

# Two different numbers, so that a count tells tokens from rows of logits.
_PROBE_TOKENS, _PROBE_ROWS = 5, 3


class NativeStep:
    """See `RecordedStep`. Keeps what the plan points to: the backend, and by `network` all weights and caches."""

    def __init__(self, plan: Any, network: Callable[[Kernels, Batch], Tensor], vocab_size: int) -> None:
        self._plan = plan
        self._network = network
        self._vocab_size = vocab_size
        self._num_rows = 0  # of the last run
        self._logits = ((0, 0), torch.empty(0))  # address and number of rows, and a view of them
        self.num_operations: int = plan.num_ops

    def run(self, batch: Batch, choose: bool, num_rounds: int = 1, end_ids: Collection[int] = ()) -> list[int]:
        self._num_rows = len(batch.logit_rows)
        chosen: list[int] = self._plan.run(
            batch.input_ids, batch.positions, batch.slot_mapping, batch.logit_rows, batch.query_starts,
            batch.context_lens, batch.block_tables, batch.source_lens, batch.source_tables,
            [slots.data_ptr() for slots in batch.adapter_slots], choose, num_rounds, list(end_ids),
        )  # fmt: skip
        return chosen

    def logits(self) -> Tensor:
        if not self._num_rows:
            return torch.empty(0, self._vocab_size)
        where = (self._plan.logits, self._num_rows)
        if self._logits[0] != where:
            memory = (ctypes.c_float * (self._num_rows * self._vocab_size)).from_address(where[0])
            self._logits = where, torch.frombuffer(memory, dtype=torch.float32).view(self._num_rows, -1)
        return self._logits[1]


class _OnlyViews(TorchDispatchMode):
    """PyTorch may make empty tensors, which are announced to the plan, and views; anything else is refused."""

    def __init__(self, plan: Any, refusal: type[Exception]) -> None:
        super().__init__()
        self._plan = plan
        self._refusal = refusal
        self.kept: list[Tensor] = []  # so that no address is given out twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_empty = func.__name__.startswith(("empty", "new_empty"))
        if func._schema.is_mutable:
            raise self._refusal(f"it changes a tensor itself ({func})")
        result = func(*args, **(kwargs or {}))
        made = list(result) if isinstance(result, (tuple, list)) else [result]
        given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, Tensor)}
        for tensor in made:
            if not isinstance(tensor, Tensor):
                raise self._refusal(f"it reads numbers itself ({func})")
            if not is_empty and tensor.untyped_storage().data_ptr() not in given:
                raise self._refusal(f"it computes a tensor itself ({func})")
            if is_empty and tensor.numel():
                self._plan.tensor(tensor.data_ptr(), tensor.nbytes, tensor.shape[0])
            self.kept.append(tensor)
        return result


def record(backend: Any, network: Callable[[Kernels, Batch], Tensor], longest: int) -> RecordedStep | str:
    """See `Kernels.record`."""
    native: Any = importlib.import_module("fastserve.kernels.cpu._native")
    plan = native.Recording(backend, _PROBE_TOKENS, _PROBE_ROWS)
    zeros = [0] * _PROBE_TOKENS
    probe = Batch(
        input_ids=zeros,
        positions=zeros,
        slot_mapping=zeros,
        query_starts=[0, _PROBE_TOKENS],
        context_lens=[longest],
        block_tables=[zeros],
        source_lens=[longest],
        source_tables=[zeros],
        logit_rows=[0] * _PROBE_ROWS,
        adapter_slots=[torch.zeros(count, dtype=torch.int64) for count in (_PROBE_TOKENS, _PROBE_ROWS)],
    )
    for number, tensor in enumerate(probe.tensors()):
        plan.input(number, tensor.data_ptr(), tensor.nbytes, tensor.shape[0])
    kernels = CPUKernels(plan)
    try:
        with torch.inference_mode(), _OnlyViews(plan, native.NotRecordable):
            logits = network(kernels, probe)
            chosen = kernels.argmax(logits)
        plan.finish(logits.data_ptr(), chosen.data_ptr())
    except native.NotRecordable as reason:
        return str(reason)
    return NativeStep(plan, network, logits.shape[1])
