"""Memory of a size that changes: addresses are reserved once, pages are taken and given back.

Linux only. Taking touches the memory, on huge pages where the system has them, so that what was planned is there.
That may go on in the background: the first request need not wait for gigabytes of zeros.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading

Range = tuple[int, int]  # first byte, and the one after the last

_TOUCHED_AT_ONCE = 16 << 20
_MADV_POPULATE_WRITE = 23  # linux/mman.h


class Pages:
    """`num_bytes` bytes, zero where they were never taken.

    Attributes:
        memory: all of it, as a buffer.
    """

    def __init__(self, num_bytes: int) -> None:
        self.memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self._coming: list[Range] = []  # in the background
        self._lock = threading.Lock()  # held while something is touched there

    def take(self, ranges: list[Range]) -> None:
        """Touch these bytes, which nobody uses yet."""
        self._prefer_huge(ranges)
        for first, last in ranges:
            if not self._populate(first, last):  # Linux before 5.14
                ctypes.memset(self._address + first, 0, last - first)

    def take_later(self, ranges: list[Range]) -> None:
        """Touch these bytes in the background where the system can leave what is written meanwhile; else now."""
        if not self._populate(0, 1):
            self.take(ranges)
            return
        self._prefer_huge(ranges)
        self._coming = ranges[::-1]
        threading.Thread(target=self._touch, name="touch-kv-cache", daemon=True).start()

    def give_back(self, ranges: list[Range]) -> None:
        """Hand the whole pages of these bytes to the system, and do not touch them any more."""
        with self._lock:
            for first, last in ranges:
                cut = [piece for a, b in self._coming for piece in ((a, min(b, first)), (max(a, last), b))]
                self._coming = [(a, b) for a, b in cut if a < b]
                start, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
                if start < end:
                    self.memory.madvise(mmap.MADV_DONTNEED, start, end - start)

    def _touch(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # of this thread: requests go first
        while True:
            with self._lock:  # in steps, so that nobody waits long
                if not self._coming:
                    return
                first, last = self._coming.pop()
                if last - first > _TOUCHED_AT_ONCE:
                    self._coming.append((first + _TOUCHED_AT_ONCE, last))
                self._populate(first, min(last, first + _TOUCHED_AT_ONCE))

    def _prefer_huge(self, ranges: list[Range]) -> None:
        """A wish: small pages work too. Within these ranges alone, so that a huge page takes no more than was asked."""
        for first, last in ranges:
            start = first // mmap.PAGESIZE * mmap.PAGESIZE
            with contextlib.suppress(OSError):
                self.memory.madvise(mmap.MADV_HUGEPAGE, start, last - start)

    def _populate(self, first: int, last: int) -> bool:
        """Have the system give the pages of these bytes now; contents stay."""
        start = first // mmap.PAGESIZE * mmap.PAGESIZE
        address, length = ctypes.c_void_p(self._address + start), ctypes.c_size_t(last - start)
        result: int = ctypes.CDLL(None).madvise(address, length, _MADV_POPULATE_WRITE)
        return result == 0
