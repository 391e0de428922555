"""A network as one native plan: run once on a probe step whose operations the library writes down, then in one call.

The network is the same code that runs operation by operation; its kernels here are `CPUKernels` over a recording in
place of the backend. So that nothing is missed, PyTorch may only make empty tensors and views meanwhile: whatever else
the network asks of it (a sum, a conversion) ends the recording, and the reason says which. Addresses that are not in
one of those tensors are constants: weights, rotation tables, caches.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
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
        self._logits = (0, torch.empty(0, vocab_size))  # address and view of the last run
        self.num_operations: int = plan.num_ops

    def run(self, batch: Batch, choose: bool) -> tuple[Tensor, list[int]]:
        num_rows = batch.logit_rows.shape[0]
        inputs = [batch.input_ids, batch.positions, batch.slot_mapping, batch.logit_rows]
        chosen = self._plan.run(
            batch.input_ids.shape[0], num_rows, [tensor.data_ptr() for tensor in inputs], batch.query_starts,
            batch.context_lens, [table.data_ptr() for table in batch.block_tables],
            batch.source_lens, [table.data_ptr() for table in batch.source_tables],
            [slots.data_ptr() for slots in batch.adapter_slots], choose,
        )  # fmt: skip
        if not num_rows:
            return torch.empty(0, self._vocab_size), chosen
        address = self._plan.logits
        where, logits = self._logits
        if where != address or len(logits) != num_rows:
            memory = (ctypes.c_float * (num_rows * self._vocab_size)).from_address(address)
            logits = torch.frombuffer(memory, dtype=torch.float32).view(num_rows, -1)
            self._logits = address, logits
        return logits, chosen


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
    ids, positions, slots, block_table = torch.zeros(4, _PROBE_TOKENS, dtype=torch.int64).unbind()
    probe = Batch(
        input_ids=ids,
        positions=positions,
        slot_mapping=slots,
        query_starts=[0, _PROBE_TOKENS],
        context_lens=[longest],
        block_tables=[block_table],
        source_lens=[longest],
        source_tables=[block_table],
        logit_rows=torch.zeros(_PROBE_ROWS, dtype=torch.int64),
        adapter_slots=[ids, torch.zeros(_PROBE_ROWS, dtype=torch.int64)],
    )
    for number, tensor in enumerate((ids, positions, slots, probe.logit_rows)):
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
