"""The memory plan: what is decided, and the errors that say what to change."""

from __future__ import annotations

import pytest
import torch

from fastserve.core.config import EngineConfig
from fastserve.core.errors import ConfigError, MemoryPlanError
from fastserve.engine import memory
from fastserve.engine.memory import MemoryPlan, free_memory, keep_freed_memory, plan_memory
from fastserve.models.model import ModelShape

GIB = 1 << 30
SHAPE = ModelShape(
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_size=128,
    hidden_size=1024,
    vocab_size=151936,
    max_positions=4096,
    dtype=torch.bfloat16,
    windows=(0,) * 28,
    num_parameters=600_000_000,
    weight_bytes=1_200_000_000,
)


def plan(free_bytes: int = 16 * GIB, **options: int | str) -> MemoryPlan:
    return plan_memory(SHAPE, torch.device("cpu"), free_bytes, EngineConfig(**options))


def test_one_block_holds_keys_and_values_of_all_layers() -> None:
    assert plan().block_bytes == 2 * 28 * 16 * 8 * 128 * 2


def test_an_int8_cache_has_nearly_twice_the_blocks() -> None:
    made, wide = plan(kv_cache_memory=GIB, kv_cache_dtype="int8"), plan(kv_cache_memory=GIB)
    assert made.block_bytes == 2 * 28 * 16 * 8 * (128 + 4)
    assert made.num_blocks == GIB // made.block_bytes
    assert 1.93 < made.num_blocks / wide.num_blocks < 1.95
    assert "int8" in made.table() and "bfloat16" in wide.table()


def test_asked_for_memory_is_used_to_the_block() -> None:
    made = plan(kv_cache_memory=GIB)
    assert made.kv_bytes <= GIB < made.kv_bytes + made.block_bytes
    assert made.max_model_len == 4096
    assert made.num_longest == made.num_blocks // 256


def test_unasked_never_more_than_the_batch_can_use() -> None:
    made = plan(max_model_len=64, max_batch_sequences=2)
    assert made.num_blocks == 2 * 4
    asked = plan(max_model_len=64, max_batch_sequences=2, kv_cache_memory=GIB)
    assert asked.num_blocks == GIB // asked.block_bytes


def test_what_it_may_grow_to_bounds_the_planned_size() -> None:
    assert plan().kv_bytes > GIB
    assert GIB - plan().block_bytes < plan(kv_cache_max_memory=GIB).kv_bytes <= GIB
    with pytest.raises(ConfigError, match="kv_cache_max_memory"):
        plan(kv_cache_max_memory=GIB, kv_cache_memory=2 * GIB)


def test_unasked_it_leaves_half_of_the_free_memory_alone() -> None:
    free = 2 * GIB
    made = plan(free)
    assert made.kv_bytes <= (free - made.activation_bytes) / 2


def test_the_longest_sequence_is_cut_to_what_fits_unless_asked_for() -> None:
    tight = GIB
    made = plan(tight)
    assert 0 < made.max_model_len < 4096
    assert made.num_blocks * 16 >= made.max_model_len
    with pytest.raises(MemoryPlanError, match=r"max_model_len.*max_batch_tokens"):
        plan(tight, max_model_len=4096)


def test_errors_name_the_setting_to_change() -> None:
    with pytest.raises(MemoryPlanError, match="lower kv_cache_memory"):
        plan(4 * GIB, kv_cache_memory=8 * GIB)
    with pytest.raises(MemoryPlanError, match="4096 positions"):
        plan(max_model_len=5000)
    with pytest.raises(MemoryPlanError, match="raise kv_cache_memory"):
        plan(kv_cache_memory=1000)


def test_the_table_says_it_all() -> None:
    text = plan(kv_cache_memory=GIB).table()
    for part in ("weights", "KV cache", "blocks", "longest sequence", "sequences at that length"):
        assert part in text


def test_free_memory_of_this_machine_is_plausible() -> None:
    assert 50_000_000 < free_memory(torch.device("cpu")) < 1 << 50


def test_a_c_library_without_settings_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_freed_memory(128 << 20)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    keep_freed_memory(128 << 20)
