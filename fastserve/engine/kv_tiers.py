"""KV blocks below the device: in host memory, in a file. Carries out the moves that the scheduler decided.

What leaves the device is copied to a buffer in the step that asks for it, so its block may be written again at once;
a thread does the rest, in order: buffer to store, store to store, store to device. A block that comes back is
reported when it is there. Errors of the disk and wrong checksums are reported as failed reads, never raised.
"""

from __future__ import annotations

import logging
import mmap
import os
import queue
import tempfile
import threading
import time
import zlib
from typing import Protocol

import torch
from torch import Tensor

from fastserve.core.errors import ConfigError
from fastserve.engine.kv_cache import KVCache

_NUM_BUFFERS = 32
_log = logging.getLogger(__name__)


class BlockStore(Protocol):
    """Slots of one block each. Called by one thread."""

    num_slots: int

    def write(self, slot: int, data: memoryview) -> None:
        """Raises OSError when it cannot be stored; the slot then holds nothing."""

    def read(self, slot: int, data: memoryview) -> bool:
        """Fill `data`; False when the slot does not hold what was written last. Raises OSError."""

    def discard(self, slot: int) -> None:
        """The slot holds nothing from now on."""

    def close(self) -> None:
        """Free what is held."""


class HostStore:
    """Slots in this process's memory, taken as they are first written."""

    def __init__(self, num_slots: int, block_bytes: int) -> None:
        self.num_slots = num_slots
        self._block_bytes = block_bytes
        self._memory = memoryview(mmap.mmap(-1, num_slots * block_bytes))
        self._written: set[int] = set()

    def write(self, slot: int, data: memoryview) -> None:
        self._written.add(slot)
        self._memory[slot * self._block_bytes : (slot + 1) * self._block_bytes] = data

    def read(self, slot: int, data: memoryview) -> bool:
        data[:] = self._memory[slot * self._block_bytes : (slot + 1) * self._block_bytes]
        return slot in self._written

    def discard(self, slot: int) -> None:
        self._written.discard(slot)

    def close(self) -> None:
        self._memory = memoryview(b"")


class FileStore:
    """Slots in a file without a name: it is gone when this process is, whatever ends it.

    Args:
        folder: where; "" for the system's temporary folder.

    Raises:
        ConfigError: no file can be made there.
    """

    def __init__(self, num_slots: int, block_bytes: int, folder: str = "") -> None:
        self.num_slots = num_slots
        self._block_bytes = block_bytes
        self._checksums: dict[int, int] = {}
        try:
            self._file = tempfile.TemporaryFile(dir=folder or None, buffering=0)  # noqa: SIM115
        except OSError as error:
            raise ConfigError(
                f"no file for KV blocks can be made in {folder or tempfile.gettempdir()} ({error.strerror}); set "
                "kv_disk_folder to a folder that can be written, or kv_disk_cache to 0"
            ) from error

    def write(self, slot: int, data: memoryview) -> None:
        self.discard(slot)
        offset, left = slot * self._block_bytes, data
        while left:
            written = os.pwrite(self._file.fileno(), left, offset)
            offset, left = offset + written, left[written:]
        self._checksums[slot] = zlib.crc32(data)

    def read(self, slot: int, data: memoryview) -> bool:
        if slot not in self._checksums:
            return False
        num_read = os.preadv(self._file.fileno(), [data], slot * self._block_bytes)
        return num_read == len(data) and zlib.crc32(data) == self._checksums[slot]

    def discard(self, slot: int) -> None:
        self._checksums.pop(slot, None)

    def close(self) -> None:
        self._file.close()


class _Buffer:
    """Room for one block, as bytes and, for each part of the cache, as a tensor."""

    def __init__(self, rows: list[Tensor]) -> None:
        sizes = [row.shape[1] * row.itemsize for row in rows]
        self.data = memoryview(mmap.mmap(-1, sum(sizes)))
        self.pieces: list[Tensor] = []
        offset = 0
        for row, size in zip(rows, sizes, strict=True):
            self.pieces.append(torch.frombuffer(self.data, dtype=row.dtype, count=row.shape[1], offset=offset))
            offset += size


class KVTiers:
    """The stores, numbered through: slot 0 is the first store's first.

    Args:
        kv_cache: the device's blocks.
        stores: the fastest first.
    """

    def __init__(self, kv_cache: KVCache, stores: list[BlockStore]) -> None:
        self.num_errors = 0
        self.wait_seconds = 0.0  # that steps were held up
        self._stores = stores
        # Wide elements: torch would split a copy of many small ones among threads.
        flat = [part.view(part.shape[0], -1).view(torch.uint8) for part in kv_cache.parts]
        self._rows = [row.view(torch.int64) if row.shape[1] % 8 == 0 else row for row in flat]
        self._own = _Buffer(self._rows)
        self._buffers: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
        for _ in range(_NUM_BUFFERS):
            self._buffers.put(_Buffer(self._rows))
        self._jobs: queue.SimpleQueue[tuple[int, int, _Buffer | None] | None] = queue.SimpleQueue()
        self._loaded: queue.SimpleQueue[tuple[int, bool, float]] = queue.SimpleQueue()
        self._num_coming = 0
        self._thread = threading.Thread(target=self._work, name="kv tiers", daemon=True)
        self._thread.start()

    def measure(self) -> list[float]:
        """Seconds to bring one block back from each store. Called before any move."""
        found: list[float] = []
        for store in self._stores:
            times: list[float] = []
            for slot in range(min(4, store.num_slots)):
                try:
                    store.write(slot, self._own.data)
                    started = time.perf_counter()
                    store.read(slot, self._own.data)
                    times.append(time.perf_counter() - started)
                except OSError as error:
                    self._count_error(error)
            found.append(min(times, default=0.0))
        return found

    def start(self, moves: list[tuple[int, int]]) -> None:
        """Begin these moves (StepPlan.moves); device blocks that are copied from may be written when this returns."""
        started = time.perf_counter()
        for source, target in moves:
            buffer = None
            if source >= 0:
                buffer = self._buffers.get()
                for row, piece in zip(self._rows, buffer.pieces, strict=True):
                    piece.copy_(row[source])
            self._num_coming += target >= 0
            self._jobs.put((source, target, buffer))
        self.wait_seconds += time.perf_counter() - started

    def collect(self, wait: bool) -> list[tuple[int, bool, float]]:
        """(block, whether it holds what it should, seconds of work) of those that arrived; with `wait`, at least one
        when any is on its way."""
        arrived: list[tuple[int, bool, float]] = []
        while self._num_coming > 0:
            started = time.perf_counter()
            try:
                arrived.append(self._loaded.get(block=wait and not arrived))
            except queue.Empty:
                break
            self._num_coming -= 1
            self.wait_seconds += time.perf_counter() - started
        return arrived

    def close(self) -> None:
        """End the thread and free the stores. Safe to call twice."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()
            for store in self._stores:
                store.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            source, target, buffer = job
            started = time.perf_counter()
            is_good = False
            try:
                is_good = self._move(source, target, buffer or self._own)
            except Exception as error:  # the thread must live: a step may wait for it
                self._count_error(error)
            if target >= 0:
                self._loaded.put((target, is_good, time.perf_counter() - started))
            if buffer is not None:
                self._buffers.put(buffer)

    def _move(self, source: int, target: int, buffer: _Buffer) -> bool:
        if target < 0:
            store, slot = self._find(~target)
            store.discard(slot)  # should the rest fail, nobody finds what was here before
        if source < 0:
            origin, from_slot = self._find(~source)
            if not origin.read(from_slot, buffer.data):
                self.num_errors += 1
                return False
        if target < 0:
            store.write(slot, buffer.data)
        else:
            for row, piece in zip(self._rows, buffer.pieces, strict=True):
                row[target].copy_(piece)
        return True

    def _find(self, slot: int) -> tuple[BlockStore, int]:
        for store in self._stores:
            if slot < store.num_slots:
                return store, slot
            slot -= store.num_slots
        raise AssertionError("no such slot")

    def _count_error(self, error: Exception) -> None:
        self.num_errors += 1
        if self.num_errors == 1:
            _log.error("a KV block could not be moved (%s): it is computed again; further errors are counted", error)
