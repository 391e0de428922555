"""fp32: tokens do not depend on where keys and values have been: a quarter of the memory, tiers, errors, resizing."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastserve import LLM, SamplingParams
from fastserve.core.errors import ConfigError
from fastserve.engine import kv_tiers
from tests import folders
from tests.parity.test_engine_identity import tokens

PROMPTS = [[3 + (7 * index + 11 * place) % 310 for place in range(10 + 3 * index)] for index in range(16)]
PARAMS = [
    SamplingParams(temperature=0.8, max_tokens=60 + 3 * (index % 8), ignore_eos=True, seed=index) for index in range(16)
]
NUM_BLOCKS = sum(-(-(len(prompt) + (item.max_tokens or 0)) // 16) for prompt, item in zip(PROMPTS, PARAMS, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.FAMILIES["llama3"](tmp_path_factory.mktemp("model") / "llama3")


def make(folder: Path, num_blocks: int, **options: Any) -> LLM:
    row = 16 + 4 if options.get("kv_cache_dtype") == "int8" else 16 * 4
    block = 2 * 2 * 16 * 2 * row
    settings = {"dtype": "float32", "max_model_len": 192, "max_batch_tokens": 64, "max_batch_sequences": 16}
    llm = LLM(folder, **{**settings, "kv_cache_memory": num_blocks * block, **options})
    assert llm.engine.memory.block_bytes == block and llm.engine.memory.num_blocks == num_blocks
    _load_is_free(llm)
    return llm


def _load_is_free(llm: LLM) -> None:
    """A model this small computes faster than a disk reads: make the choice for reading all the same."""
    llm.engine._scheduler.cost.prefill_seconds = lambda num_tokens, start=0: 1e3  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    return tokens(make(folder, NUM_BLOCKS).generate(PROMPTS, PARAMS))


@pytest.mark.parametrize("policy", ["fcfs", "priority", "skip-join-mlfq", "aged-srpt"])
@pytest.mark.parametrize("tiers", [{"kv_disk_cache": "8MiB"}, {"kv_host_cache": "256KiB", "kv_disk_cache": "8MiB"}])
def test_a_quarter_of_the_memory(folder: Path, expected: list[list[int]], policy: str, tiers: dict[str, str]) -> None:
    llm = make(folder, NUM_BLOCKS // 4, scheduler=policy, prefix_caching=False, **tiers)
    assert tokens(llm.generate(PROMPTS, PARAMS)) == expected
    stats = llm.engine.stats()
    assert stats.num_preemptions > 0 and stats.kv_blocks_restored > 0 and stats.kv_errors == 0
    llm.engine.close()


@pytest.mark.parametrize("name", ["kv_host_cache", "kv_disk_cache"])
def test_a_tier_that_holds_no_block_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        make(folder, 12, **{name: 100})


def test_a_quarter_of_the_memory_in_eight_bits(folder: Path) -> None:
    whole = make(folder, NUM_BLOCKS, kv_cache_dtype="int8")
    llm = make(folder, NUM_BLOCKS // 4, kv_cache_dtype="int8", kv_disk_cache="8MiB", prefix_caching=False)
    assert tokens(llm.generate(PROMPTS, PARAMS)) == tokens(whole.generate(PROMPTS, PARAMS))
    stats = llm.engine.stats()
    assert stats.kv_blocks_restored > 0 and stats.kv_errors == 0
    llm.engine.close()


def test_a_chat_comes_back_after_its_blocks_left_memory(folder: Path) -> None:
    llm = make(folder, 16, kv_disk_cache="8MiB", kv_replacement="lfu")
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    first = llm.generate(PROMPTS[3], params)[0]
    for prompt in PROMPTS[8:]:
        llm.generate(prompt, params)  # one at a time: together they overwrite every block
    turn = [*PROMPTS[3], *first.outputs[0].token_ids, 5, 6, 7]
    second = llm.generate(turn, params)[0]
    assert second.num_cached_tokens == (len(turn) - 4) // 16 * 16
    assert llm.engine.stats().kv_blocks_restored > 0
    fresh = make(folder, 16).generate(turn, params)[0]
    assert second.outputs[0].token_ids == fresh.outputs[0].token_ids


@pytest.mark.parametrize("fault", ["flipped", "full", "unreadable"])
def test_a_failing_disk_costs_time_and_nothing_else(
    folder: Path, expected: list[list[int]], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make(folder, NUM_BLOCKS // 4, kv_disk_cache="8MiB")
    calls = 0

    def fails_every_other_time() -> bool:
        nonlocal calls
        calls += 1
        return calls % 2 == 0

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if fault == "full" and fails_every_other_time():
            raise OSError(errno.ENOSPC, "no space left on device")
        written = os.pwrite(descriptor, data, offset)
        if fault == "flipped" and fails_every_other_time():
            os.pwrite(descriptor, bytes([data[100] ^ 1]), offset + 100)
        return written

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if fault == "unreadable" and fails_every_other_time():
            raise OSError(errno.EIO, "input/output error")
        return os.preadv(descriptor, buffers, offset)

    monkeypatch.setattr(kv_tiers, "os", SimpleNamespace(pwrite=pwrite, preadv=preadv))
    assert tokens(llm.generate(PROMPTS, PARAMS)) == expected
    stats = llm.engine.stats()
    assert stats.kv_errors > 0 and stats.recomputed_tokens > 0
    llm.engine.close()


def test_resizing_while_serving(folder: Path, expected: list[list[int]]) -> None:
    block = 2 * 2 * 16 * 2 * 16 * 4
    llm = make(folder, NUM_BLOCKS // 2, kv_cache_max_memory=NUM_BLOCKS * block, kv_disk_cache="8MiB")
    engine = llm.engine
    engine._elastic.interval = float("inf")  # by request only
    sizes = [NUM_BLOCKS, 12, NUM_BLOCKS // 3, 10 * NUM_BLOCKS, 1]
    step, count = engine.step, 0

    def step_and_resize() -> Any:
        nonlocal count
        count += 1
        if count % 7 == 0:
            engine.resize_kv_cache(sizes[count // 7 % len(sizes)] * block)
        return step()

    engine.step = step_and_resize  # type: ignore[method-assign]
    assert tokens(llm.generate(PROMPTS, PARAMS)) == expected
    engine.step = step  # type: ignore[method-assign]
    engine.resize_kv_cache(0)
    assert engine.stats().kv_blocks_total == 12  # the longest sequence still fits
    engine.resize_kv_cache(10**9)
    assert engine.stats().kv_blocks_total == NUM_BLOCKS
