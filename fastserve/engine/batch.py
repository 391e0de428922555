"""StepPlan -> the padding-free batch that one forward pass computes."""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch

from fastserve.kernels.interface import Batch
from fastserve.scheduler.plan import StepPlan


def make_batch(
    plan: StepPlan, block_size: int, device: torch.device, all_rows: Container[str], adapter_slots: Mapping[str, int]
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
    logit_rows: list[int] = []
    row_ranges: list[tuple[int, int]] = []
    for entry in plan.entries:
        start, end = entry.start, entry.start + len(entry.token_ids)
        first_row, last = len(logit_rows), len(input_ids) + len(entry.token_ids)
        if entry.request_id in all_rows:
            logit_rows.extend(range(len(input_ids), last))
        elif entry.samples:
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
    adapters: list[int] = []
    if adapter_slots:
        adapters = [adapter_slots.get(entry.request_id, -1) for entry in plan.entries for _ in entry.token_ids]
    adapted = [adapters, [adapters[row] for row in logit_rows]] if max(adapters, default=-1) >= 0 else []
    batch = Batch(
        input_ids=input_ids,
        positions=positions,
        slot_mapping=slots,
        query_starts=query_starts,
        context_lens=context_lens,
        block_tables=[entry.block_ids for entry in plan.entries],
        logit_rows=logit_rows,
        request_ids=[entry.request_id for entry in plan.entries],
        adapter_slots=[torch.tensor(slots, dtype=torch.int64, device=device) for slots in adapted],
        device=device,
    )
    return batch, row_ranges
