"""StepPlan -> tensors: the padding-free batch that one forward pass computes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fastserve.kernels.interface import Batch
from fastserve.scheduler.plan import StepPlan


class BlockTables:
    """Each live sequence's block ids as a tensor, kept over steps so that a decode step copies nothing but new ids."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._tables: dict[str, Tensor] = {}

    def get(self, request_id: str, block_ids: list[int]) -> Tensor:
        """The table of a sequence, [num_blocks] int64."""
        table = self._tables.get(request_id)
        if table is None or len(table) != len(block_ids):
            table = _as_tensor(block_ids, self.device)
            self._tables[request_id] = table
        return table

    def drop(self, request_id: str) -> None:
        self._tables.pop(request_id, None)


def make_batch(
    plan: StepPlan, block_size: int, tables: BlockTables, all_rows: set[str], adapter_slots: Mapping[str, int]
) -> tuple[Batch, list[tuple[int, int]]]:
    """Lay out a plan.

    Args:
        all_rows: requests that need logits at every position of this step (prompt log probabilities).
        adapter_slots: slots of the requests that have an adapter.

    Returns:
        The batch, and for each entry the range of its rows in `logit_rows` (empty when it needs none).
    """
    input_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    query_starts = [0]
    context_lens: list[int] = []
    block_tables: list[Tensor] = []
    logit_rows: list[int] = []
    row_ranges: list[tuple[int, int]] = []
    for entry in plan.entries:
        start, end = entry.start, entry.start + len(entry.token_ids)
        first_row = len(logit_rows)
        if entry.request_id in all_rows:
            logit_rows.extend(range(len(input_ids), len(input_ids) + end - start))
        elif entry.samples:
            last = len(input_ids) + end - start
            logit_rows.extend(range(last - 1 - entry.num_drafts, last))
        row_ranges.append((first_row, len(logit_rows)))
        input_ids.extend(entry.token_ids)
        positions.extend(range(start, end))
        blocks = entry.block_ids
        slots.extend(
            blocks[position // block_size] * block_size + position % block_size for position in range(start, end)
        )
        query_starts.append(len(input_ids))
        context_lens.append(end)
        block_tables.append(tables.get(entry.request_id, blocks))
    adapters: list[int] = []
    if adapter_slots:
        adapters = [adapter_slots.get(entry.request_id, -1) for entry in plan.entries for _ in entry.token_ids]
    device = tables.device
    adapted = [adapters, [adapters[row] for row in logit_rows]] if max(adapters, default=-1) >= 0 else []
    ids, places, mapping = _as_tensor([input_ids, positions, slots], device).unbind()
    batch = Batch(
        input_ids=ids,
        positions=places,
        slot_mapping=mapping,
        query_starts=query_starts,
        context_lens=context_lens,
        block_tables=block_tables,
        logit_rows=_as_tensor(logit_rows, device),
        request_ids=[entry.request_id for entry in plan.entries],
        adapter_slots=[_as_tensor(slots, device) for slots in adapted],
    )
    return batch, row_ranges


def _as_tensor(values: list[int] | list[list[int]], device: torch.device) -> Tensor:
    """[len(values)] int64, or a row for each list; `torch.tensor` takes five times as long for a short list."""
    return torch.from_numpy(np.array(values, dtype=np.int64)).to(device)
