"""The block pool and the prefix index: who owns which block, and which full blocks can be shared. No torch here.

A block carries everything needed to continue after it: the K and V of its tokens and a conv tail
(`kernels.forward_batch` holds the tensors, under the same ids). Ownership of a block id:

    state       ref_count  hash  where it is     who may write it
    free        0          no    free list       nobody
    used        1          no    a block table   that sequence, and only while the block is its last
    indexed     >= 1       yes   block tables    nobody: a full block never changes
    cached      0          yes   LRU             nobody; evicted, oldest first, when the free list is empty

Block 0 is the scratch block of padding; it is never handed out. `num_free + num_cached + num_used == num_blocks`.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from lfm.errors import InternalError

HASH_BYTES = 16


class BlockHasher:
    """Keyed hashes over a chain of full blocks: parent, token ids, and at the root tenant, model and K/V dtype.

    The key is random per process, so that no caller can construct a collision with somebody else's prefix.
    """

    def __init__(self, key: bytes, *, model: str, kv_dtype: str) -> None:
        self._keyed = blake2b(digest_size=HASH_BYTES, key=key)
        self._scope = f"{len(model)}:{model}:{kv_dtype}:"

    def root(self, tenant: str) -> bytes:
        """The parent of a tenant's first blocks: other tenants, models and dtypes never meet."""
        return self._digest((self._scope + tenant).encode("utf-8", "surrogatepass"))

    def chain(self, parent: bytes, token_ids: Sequence[int], *, block_size: int) -> list[bytes]:
        """The hashes of full blocks after `parent`, each the parent of the next."""
        data, hashes = array("i", token_ids).tobytes(), []
        num_bytes = block_size * array("i").itemsize
        for begin in range(0, len(data), num_bytes):
            parent = self._digest(parent + data[begin : begin + num_bytes])
            hashes.append(parent)
        return hashes

    def _digest(self, data: bytes) -> bytes:
        hashed = self._keyed.copy()  # cheaper than taking the key in again for every block
        hashed.update(data)
        return hashed.digest()


class BlockPool:
    """Reference-counted blocks with an index of the full ones. One thread owns it."""

    def __init__(self, num_blocks: int) -> None:
        """`num_blocks` usable blocks, numbered 1 to num_blocks."""
        self.num_blocks = num_blocks
        self._ref_counts = [0] * (num_blocks + 1)
        self._hashes: list[bytes | None] = [None] * (num_blocks + 1)
        self._by_hash: dict[bytes, int] = {}
        self._free = list(range(num_blocks, 0, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # unreferenced indexed blocks, oldest first

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out now: free ones, and cached ones that may be evicted."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_available

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each with one reference. The caller has checked `num_available`."""
        if count > self.num_available:
            raise InternalError(f"block pool: {count} blocks wanted, {self.num_available} available")
        blocks = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict()
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        block_hash = self._hashes[block]
        assert block_hash is not None
        del self._by_hash[block_hash]
        self._hashes[block] = None
        return block

    def find(self, block_hash: bytes) -> int | None:
        """The indexed block with this hash, used or cached."""
        return self._by_hash.get(block_hash)

    def is_cached(self, block: int) -> bool:
        """Whether the block is unreferenced: sharing it would take it out of what `num_available` counts."""
        return block in self._cached

    def share(self, block: int) -> None:
        """Add a reference to an indexed block."""
        if self._ref_counts[block] == 0:
            del self._cached[block]
        self._ref_counts[block] += 1

    def index(self, block: int, block_hash: bytes) -> None:
        """Make a full block findable. If another block holds the same content already, this one stays private."""
        if block_hash not in self._by_hash and self._hashes[block] is None:
            self._by_hash[block_hash] = block
            self._hashes[block] = block_hash

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each block of a table, leaf first, so that leaves are evicted before their roots."""
        for block in reversed(blocks):
            if self._ref_counts[block] <= 0:
                raise InternalError(f"block pool: block {block} released twice")
            self._ref_counts[block] -= 1
            if self._ref_counts[block]:
                continue
            if self._hashes[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def forget(self) -> None:
        """Drop every cached block's content (between benchmark runs)."""
        while self._cached:
            self._free.append(self._evict())

    def check_balance(self, tables: Sequence[Sequence[int]]) -> None:
        """Raise InternalError unless the pool balances with these block tables. Called when idle and in tests."""
        references = [0] * (self.num_blocks + 1)
        for table in tables:
            for block in table:
                references[block] += 1
        if references != self._ref_counts:
            wrong = [b for b, (a, c) in enumerate(zip(references, self._ref_counts, strict=True)) if a != c]
            raise InternalError(f"block pool: reference counts of blocks {wrong[:8]} do not match the block tables")
        used = self.num_blocks - references[1:].count(0)
        if len(self._free) + len(self._cached) + used != self.num_blocks:
            raise InternalError(
                f"block pool: {len(self._free)} free + {len(self._cached)} cached + {used} used != {self.num_blocks}"
            )
        if not self._by_hash and not self._cached and self._hashes.count(None) == len(self._hashes):
            return  # nothing is indexed: an answer's last token need not wait for sets of all blocks
        indexed = {block for block, block_hash in enumerate(self._hashes) if block_hash is not None}
        is_index = indexed == set(self._by_hash.values())
        if not (is_index and indexed.isdisjoint(self._free) and self._cached.keys() <= indexed):
            raise InternalError("block pool: the prefix index does not match the blocks")
