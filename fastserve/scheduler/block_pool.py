"""Which KV block belongs to whom: reference counts, the free list, and the prefix cache over it.

A block that nobody holds stays in the prefix cache until its turn comes at the front of the free list, which is in
order of release: least recently used goes first. Only integers here; the tensors are in `engine/kv_cache.py`.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence as SequenceOf

from fastserve.scheduler.sequence import Sequence
from fastserve.scheduler.tier_pool import TierPool


def hash_block(parent: bytes, token_ids: SequenceOf[int]) -> bytes:
    """Hash of a full block: its tokens and, through `parent`, everything before it. 128 bits, so equal means equal."""
    return hashlib.blake2b(parent + array("I", token_ids).tobytes(), digest_size=16).digest()


class BlockPool:
    """Fixed number of blocks, shared by live sequences and the prefix cache.

    Args:
        num_blocks: blocks in all.
        block_size: tokens in a block.
        prefix_caching: sequences share full blocks of equal content.
        tiers: where content goes that is about to be overwritten.

    Attributes:
        is_findable: full blocks are found by content, if only by the sequence that made them.
        num_used: blocks that somebody holds.
    """

    def __init__(
        self, num_blocks: int, block_size: int, prefix_caching: bool = True, tiers: TierPool | None = None
    ) -> None:
        assert num_blocks > 0 and block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self.tiers = tiers
        self.is_findable = prefix_caching or tiers is not None
        self.num_used = 0
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
    def num_reachable(self) -> int:
        """Blocks whose memory is in use: all, and those above that are still held after the pool shrank."""
        return len(self._references)

    def resize(self, num_blocks: int) -> None:
        """Grow, or shrink to the first `num_blocks`; blocks above that are held go when they are given up."""
        assert num_blocks > 0
        for block_id in range(num_blocks, self.num_blocks):
            if self._references[block_id] == 0:
                del self._free[block_id]
                self._forget(block_id)
        first, self.num_blocks = self.num_blocks, num_blocks
        missing = num_blocks - len(self._references)
        self._references.extend([0] * missing)
        self._hashes.extend([None] * missing)
        self._free.update(dict.fromkeys(index for index in range(first, num_blocks) if self._references[index] == 0))
        self._trim()

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

    def prefix_hashes(self, sequence: Sequence) -> list[bytes]:
        """Hashes of the leading full blocks, one token short of all: at least one token must be computed."""
        if not self.is_findable or sequence.request.sampling.prompt_logprobs is not None:
            return []
        return self._hashes_of(sequence, (len(sequence.token_ids) - 1) // self.block_size)

    def count_cached(self, sequence: Sequence) -> int:
        """Leading tokens that need not be computed: their blocks are here or in a tier."""
        hashes = self.prefix_hashes(sequence)
        matched, _ = self.count_free_matches(hashes)
        if self.tiers is not None:
            matched += self.tiers.count(hashes[matched:])
        return matched * self.block_size

    def match_prefix(self, hashes: SequenceOf[bytes]) -> list[int]:
        """Blocks of the longest cached run of `hashes`, each now held once more by the caller."""
        found: list[int] = []
        for block_hash in hashes:
            block_id = self._by_hash.get(block_hash)
            if block_id is None:
                break
            if self._references[block_id] == 0:
                del self._free[block_id]
                self.num_used += 1
            self._references[block_id] += 1
            found.append(block_id)
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
        self.num_used += num_blocks
        return taken

    def share(self, block_ids: SequenceOf[int]) -> None:
        """Hold blocks once more that somebody holds."""
        for block_id in block_ids:
            assert self._references[block_id] > 0, "only held blocks can be shared"
            self._references[block_id] += 1

    def num_holders(self, block_id: int) -> int:
        return self._references[block_id]

    def publish(self, block_id: int, block_hash: bytes) -> None:
        """Make a full, computed block findable. The first block with a given content wins."""
        assert self._references[block_id] > 0, "only held blocks can be published"
        if self.is_findable and self._hashes[block_id] is None and block_hash not in self._by_hash:
            self._hashes[block_id] = block_hash
            self._by_hash[block_hash] = block_id

    def publish_computed(self, sequence: Sequence) -> None:
        """Make a sequence's full, computed blocks findable."""
        num_full = sequence.num_computed // self.block_size
        if self.is_findable:
            hashes = self._hashes_of(sequence, num_full)
            for index in range(sequence.num_published, num_full):
                self.publish(sequence.block_ids[index], hashes[index])
            sequence.num_published = max(sequence.num_published, num_full)

    def _hashes_of(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        """Of its leading full blocks. Sequences with different adapters have none in common, nor with different
        sources, of which every block depends on all tokens."""
        hashes, size = sequence.block_hashes, self.block_size
        if num_blocks and not hashes:
            root = (sequence.request.adapter if self.prefix_caching else sequence.request_id).encode()
            source = array("I", sequence.token_ids[: sequence.request.num_source]).tobytes()
            hashes.append(hash_block(root + source, sequence.token_ids[:size]))
        while len(hashes) < num_blocks:
            start = len(hashes) * size
            hashes.append(hash_block(hashes[-1], sequence.token_ids[start : start + size]))
        return hashes[:num_blocks]

    def free(self, block_ids: SequenceOf[int], ends: bool = False) -> None:
        """Give up one hold on each block. Later positions are evicted before earlier ones, which more prompts share.
        When their sequence ends, nobody asks for them again without prefix caching: no tier need keep them."""
        for block_id in reversed(block_ids):
            assert self._references[block_id] > 0, "block freed twice"
            self._references[block_id] -= 1
            if self._references[block_id] > 0:
                continue
            self.num_used -= 1
            if ends and not self.prefix_caching:
                self._forget(block_id, is_useless=True)
            if block_id >= self.num_blocks:
                self._forget(block_id)
                self._trim()
            else:
                self._free[block_id] = None
                if self._hashes[block_id] is None:
                    self._free.move_to_end(block_id, last=False)

    def _trim(self) -> None:
        while len(self._references) > self.num_blocks and self._references[-1] == 0:
            self._references.pop()
            self._hashes.pop()

    def _forget(self, block_id: int, is_useless: bool = False) -> None:
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            if self.tiers is not None and not is_useless:
                self.tiers.keep(block_id, block_hash)
            self._hashes[block_id] = None
            del self._by_hash[block_hash]
