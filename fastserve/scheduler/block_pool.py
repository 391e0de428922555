"""Which KV block belongs to whom: reference counts, the free list, and the prefix cache over it.

A block that nobody holds stays in the prefix cache until its turn comes at the front of the free list, which is in
order of release: least recently used goes first. Only integers here; the tensors are in `engine/kv_cache.py`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as SequenceOf


def hash_block(parent: bytes, token_ids: SequenceOf[int]) -> bytes:
    """Hash of a full block: its tokens and, through `parent`, everything before it. 128 bits, so equal means equal."""
    return hashlib.blake2b(parent + array("I", token_ids).tobytes(), digest_size=16).digest()


class BlockPool:
    """Fixed number of blocks, shared by live sequences and the prefix cache.

    Args:
        num_blocks: blocks in all.
        block_size: tokens in a block.
        prefix_caching: keep full blocks findable by content.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        assert num_blocks > 0 and block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.num_queries = 0
        self.num_hits = 0
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._by_hash: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, cached ones included."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def count_free_matches(self, hashes: SequenceOf[bytes]) -> tuple[int, int]:
        """How many leading `hashes` are cached, and how many of those blocks would come off the free list."""
        matched = from_free = 0
        for block_hash in hashes:
            block_id = self._by_hash.get(block_hash)
            if block_id is None:
                break
            matched += 1
            from_free += self._references[block_id] == 0
        return matched, from_free

    def match_prefix(self, hashes: SequenceOf[bytes]) -> list[int]:
        """Blocks of the longest cached run of `hashes`, each now held once more by the caller."""
        found: list[int] = []
        self.num_queries += len(hashes) * self.block_size
        for block_hash in hashes:
            block_id = self._by_hash.get(block_hash)
            if block_id is None:
                break
            if self._references[block_id] == 0:
                del self._free[block_id]
            self._references[block_id] += 1
            found.append(block_id)
        self.num_hits += len(found) * self.block_size
        return found

    def allocate(self, num_blocks: int) -> list[int] | None:
        """`num_blocks` blocks with undefined content, or None (and nothing taken) when there are not as many free."""
        if num_blocks > len(self._free):
            return None
        taken: list[int] = []
        for _ in range(num_blocks):
            block_id, _ = self._free.popitem(last=False)
            self._forget(block_id)
            self._references[block_id] = 1
            taken.append(block_id)
        return taken

    def publish(self, block_id: int, block_hash: bytes) -> None:
        """Make a full, computed block findable. The first block with a given content wins."""
        assert self._references[block_id] > 0, "only held blocks can be published"
        if self.prefix_caching and self._hashes[block_id] is None and block_hash not in self._by_hash:
            self._hashes[block_id] = block_hash
            self._by_hash[block_hash] = block_id

    def free(self, block_ids: SequenceOf[int]) -> None:
        """Give up one hold on each block. Later positions are evicted before earlier ones, which more prompts share."""
        for block_id in reversed(block_ids):
            assert self._references[block_id] > 0, "block freed twice"
            self._references[block_id] -= 1
            if self._references[block_id] == 0:
                self._free[block_id] = None
                if self._hashes[block_id] is None:
                    self._free.move_to_end(block_id, last=False)

    def _forget(self, block_id: int) -> None:
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            self._hashes[block_id] = None
            del self._by_hash[block_hash]
