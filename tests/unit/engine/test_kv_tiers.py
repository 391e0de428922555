"""Stores and moves: bytes come back as they went, or are reported missing; memory is taken and given back."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from pathlib import Path

import pytest
import torch

from fastserve.core.errors import ConfigError
from fastserve.engine.kv_cache import KVCache
from fastserve.engine.kv_tiers import BlockStore, FileStore, HostStore, KVTiers
from fastserve.engine.memory import ElasticSize
from fastserve.models.model import ModelShape

LAYERS, BLOCKS = 2, 8


def make_cache(num_blocks: int = BLOCKS, max_blocks: int = 0, block_size: int = 4) -> KVCache:
    shape = ModelShape(LAYERS, 2, 2, 3, 6, 10, 64, torch.float32, (0,) * LAYERS, 0, 0)
    return KVCache(shape, block_size, num_blocks, max_blocks, torch.device("cpu"), is_int8=False)


def block_bytes(cache: KVCache) -> int:
    return sum(part[0].numel() * part.itemsize for part in cache.parts)


def fill(cache: KVCache) -> list[torch.Tensor]:
    for part in cache.parts:
        part.copy_(torch.randn(part.shape))
    return [part.clone() for part in cache.parts]


@pytest.fixture
def stores(tmp_path: Path) -> list[BlockStore]:
    size = block_bytes(make_cache())
    return [HostStore(2, size), FileStore(4, size, str(tmp_path))]


def wait_for(tiers: KVTiers, count: int) -> dict[int, bool]:
    found: dict[int, bool] = {}
    while len(found) < count:
        found.update((block, is_good) for block, is_good, _ in tiers.collect(wait=True))
    return found


def test_blocks_go_down_two_tiers_and_come_back_elsewhere(stores: list[BlockStore]) -> None:
    cache = make_cache()
    before = fill(cache)
    tiers = KVTiers(cache, stores)
    tiers.start([(0, ~0), (1, ~1), (~0, ~3), (2, ~0)])
    for part in cache.parts:
        part[:3].zero_()  # at once: what left was copied
    tiers.start([(~3, 5), (~1, 6), (~0, 7)])
    assert wait_for(tiers, 3) == {5: True, 6: True, 7: True}
    for part, old in zip(cache.parts, before, strict=True):
        assert torch.equal(part[5:8], old[[0, 1, 2]])
    assert tiers.collect(wait=True) == []  # nothing is on its way: no waiting
    tiers.close()
    tiers.close()


def test_a_slot_that_was_never_written_or_lost_its_source_is_reported(stores: list[BlockStore]) -> None:
    tiers = KVTiers(make_cache(), stores)
    tiers.start([(0, ~3), (~1, ~3), (~3, 5)])  # the second fails, so the third must not find block 0
    assert wait_for(tiers, 1) == {5: False}
    assert tiers.num_errors == 2
    tiers.close()


def test_the_file_has_no_name(tmp_path: Path) -> None:
    store = FileStore(1, 16, str(tmp_path))
    store.write(0, memoryview(b"0123456789abcdef"))
    assert list(tmp_path.iterdir()) == []
    store.close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kv_disk_folder"):
        FileStore(1, 16, str(tmp_path / "missing"))


def test_measuring_does_not_leave_anything_that_matters(stores: list[BlockStore]) -> None:
    tiers = KVTiers(make_cache(), stores)
    assert all(seconds > 0 for seconds in tiers.measure())
    tiers.close()


def test_a_cache_takes_memory_for_what_it_has_and_gives_it_back() -> None:
    cache = make_cache(num_blocks=64, max_blocks=4096, block_size=64)  # 1.5 KiB per block and part
    start = resident_bytes()
    cache.resize(4096)
    grown = resident_bytes()
    cache.resize(64)
    total = 4096 * block_bytes(cache)
    assert grown - start > 0.9 * total
    assert resident_bytes() - start < 0.1 * total
    assert all(not part[64:].any() for part in cache.parts)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_elastic_size_moves_in_bounded_steps_within_bounds() -> None:
    elastic = ElasticSize(block_bytes=100, min_blocks=10, max_blocks=80, margin_bytes=1000)
    assert elastic.advise(500, 80, 80) == 70
    assert elastic.advise(500, 12, 0) == 10
    assert elastic.advise(10**6, 40, 20) == 40  # nobody needs more
    assert elastic.advise(10**6, 40, 39) == 50
    assert elastic.advise(1300, 40, 40) == 43  # what is free beyond the margin
    assert elastic.advise(10**6, 79, 79) == 80


def test_file_store_notices_a_changed_byte(tmp_path: Path) -> None:
    store = FileStore(2, 16, str(tmp_path))
    store.write(1, memoryview(b"0123456789abcdef"))
    os.pwrite(store._file.fileno(), b"X", 20)
    assert not store.read(1, memoryview(bytearray(16)))
    store.close()


def test_what_was_given_back_is_not_taken_again_by_the_touching_in_the_background() -> None:
    cache = make_cache(num_blocks=4096, max_blocks=8192, block_size=64)
    kept = cache.keys[0][3].fill_(7.0).clone()
    cache.resize(16)
    for thread in threading.enumerate():
        if thread.name == "touch-kv-cache":
            thread.join(10)
    size = cache.parts[0][0].numel() * 4
    # A huge page that lies across the boundary may stay whole for a while.
    assert all(resident_bytes_of(part, 16 * size, 8192 * size) <= 2 << 20 for part in cache.parts)
    assert 4096 * size > 4 << 20
    assert all(resident_bytes_of(part, 0, 16 * size) > 0 for part in cache.parts)
    assert torch.equal(cache.keys[0][3], kept)


def resident_bytes_of(part: torch.Tensor, first: int, last: int) -> int:
    """Of whole pages within these bytes of a tensor."""
    page = mmap.PAGESIZE
    start, end = -(-(part.data_ptr() + first) // page) * page, (part.data_ptr() + last) // page * page
    found = (ctypes.c_ubyte * ((end - start) // page))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(end - start), found) == 0
    return page * sum(item & 1 for item in found)
