"""Plan memory at start: what the weights take, what a step takes, what is left for KV blocks; say it in one table.

The plan errs on the safe side and changes nothing by itself. What is free is what the operating system or the card
reports now, cut to the process's own limit (cgroup), so a container is respected.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

import torch

from fastserve.core.config import EngineConfig, format_bytes
from fastserve.core.errors import MemoryPlanError
from fastserve.core.machine import free_host_memory
from fastserve.engine.kv_cache import KVCache
from fastserve.models.model import ModelShape

_CPU_SHARE = 0.5  # of the free memory, at most, without being asked: other programs run on the same machine
_CPU_LIMIT = 2 << 30  # it is touched at start, which takes time; a longer max_model_len asks for more
_GPU_SHARE = 0.9
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes in bytes, lengths in tokens."""

    weight_bytes: int
    activation_bytes: int
    free_bytes: int
    block_size: int
    block_bytes: int
    num_blocks: int
    max_model_len: int
    kv_dtype: torch.dtype

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def num_longest(self) -> int:
        """Sequences of the longest length that fit at once."""
        return self.num_blocks // -(-self.max_model_len // self.block_size)

    def rows(self) -> list[tuple[str, str]]:
        """The table, for people."""
        tokens, kv_type = self.num_blocks * self.block_size, str(self.kv_dtype).removeprefix("torch.")
        return [
            ("weights", format_bytes(self.weight_bytes)),
            ("one step, at most", format_bytes(self.activation_bytes)),
            ("KV cache", f"{format_bytes(self.kv_bytes)} ({self.num_blocks:,} blocks, {tokens:,} tokens, {kv_type})"),
            ("longest sequence", f"{self.max_model_len:,} tokens"),
            ("sequences at that length", f"{self.num_longest:,}"),
            ("free before the KV cache", format_bytes(self.free_bytes)),
        ]

    def table(self) -> str:
        width = max(len(name) for name, _ in self.rows())
        return "\n".join(f"{name:<{width}}  {value}" for name, value in self.rows())


@dataclass(slots=True)
class ElasticSize:
    """How large the KV cache should be, by what the machine has free: at most an eighth more or less at a time.

    Attributes:
        block_bytes, min_blocks, max_blocks: the cache and its bounds.
        margin_bytes: keep so much free; below it the cache shrinks, and it grows only when this remains.
        interval: seconds between looks.
    """

    block_bytes: int
    min_blocks: int
    max_blocks: int
    margin_bytes: int
    interval: float = 1.0
    next_look: float = 0.0

    def advise(self, free_bytes: int, num_blocks: int, num_used: int) -> int:
        """The number of blocks to have; grows only when nearly all are held."""
        step = max(1, self.max_blocks // 8)
        if free_bytes < self.margin_bytes:
            return max(self.min_blocks, num_blocks - step)
        room = (free_bytes - self.margin_bytes) // self.block_bytes
        if num_used >= 0.9 * num_blocks:
            return min(self.max_blocks, num_blocks + min(step, room))
        return num_blocks


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return free_host_memory()


def keep_freed_memory(num_bytes: int) -> None:
    """Have the C library keep up to so much of what is freed for later, where it can be told so (glibc).

    An encoder's tensors of tens of megabytes come and go with every operation. Fetched from the system each time, which
    clears their pages, they take 2 % of a step in float32.
    """
    tell = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # Old versions refuse so high a first one, and the second alone would pin it to the lowest.
    if tell is not None and tell(_M_MMAP_THRESHOLD, num_bytes):
        tell(_M_TRIM_THRESHOLD, num_bytes)


def plan_memory(
    shape: ModelShape, device: torch.device, free_bytes: int, config: EngineConfig, draft: ModelShape | None = None
) -> MemoryPlan:
    """Decide the number of KV blocks and the longest sequence.

    Args:
        free_bytes: memory left after the weights were loaded.
        config: says block_size, what a step may have, and kv_cache_memory and max_model_len, 0 to decide here.
        draft: of a model that guesses, with keys and values of its own in each block.

    Raises:
        MemoryPlanError: not even one sequence fits; the message names what to change.
    """
    block_size, max_model_len, kv_cache_memory = config.block_size, config.max_model_len, config.kv_cache_memory
    if max_model_len > shape.max_positions:
        raise MemoryPlanError(
            f"max_model_len is {max_model_len}, but the model was made for {shape.max_positions} positions; lower it"
        )
    longest = max_model_len or shape.max_positions
    activation = activation_bytes(shape, config.max_batch_sequences, config.max_batch_tokens)
    is_int8 = config.kv_cache_dtype == "int8"
    block = sum(KVCache.block_bytes(one, block_size, is_int8) for one in (shape, draft) if one is not None)
    available = max(0, free_bytes - activation)
    if kv_cache_memory > available:
        raise MemoryPlanError(
            f"kv_cache_memory asks for {format_bytes(kv_cache_memory)}, but only {format_bytes(available)} are "
            f"free after the weights and a step of {format_bytes(activation)}; lower kv_cache_memory or "
            "max_batch_tokens"
        )
    if device.type == "cuda":
        budget = int(available * _GPU_SHARE)
    else:
        wanted = -(-max_model_len // block_size) * block
        budget = min(int(available * _CPU_SHARE), max(_CPU_LIMIT, wanted), config.kv_cache_max_memory or available)
    full_batch = config.max_batch_sequences * -(-longest // block_size) * block
    budget = kv_cache_memory or min(budget, full_batch)
    num_blocks = budget // block
    capacity = num_blocks * block_size
    if capacity < longest:
        smallest = block_size * 2
        if max_model_len or capacity < smallest:
            wanted = max_model_len or smallest
            raise MemoryPlanError(
                f"the KV cache would hold {capacity} tokens ({format_bytes(budget)}), but one sequence of {wanted} "
                f"tokens needs {format_bytes(-(-wanted // block_size) * block)}; raise kv_cache_memory, lower "
                f"max_model_len or max_batch_tokens, or free memory ({format_bytes(free_bytes)} are free)"
            )
        longest = capacity
    kv_dtype = torch.int8 if is_int8 else shape.dtype
    return MemoryPlan(shape.weight_bytes, activation, free_bytes, block_size, block, num_blocks, longest, kv_dtype)


def activation_bytes(shape: ModelShape, max_batch_sequences: int, max_batch_tokens: int) -> int:
    """Upper estimate of one step's temporary tensors: about twelve hidden-sized rows per token, and the logits."""
    rows = max_batch_tokens * shape.hidden_size * shape.dtype.itemsize * 12
    logits = max_batch_sequences * shape.vocab_size * 4 * 3
    return rows + logits
