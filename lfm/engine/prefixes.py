"""Full blocks that sequences share: which of them are in the pool, and who computes the others. No torch here.

A sequence that needs a block which a running one is computing waits for it: the leader's answer makes it findable.
"""

from lfm.engine.cache import BlockHasher, BlockPool
from lfm.engine.sequence import Sequence

# A follower waits for the leader that computes its next block at most this many steps, then computes it itself.
MAX_LEADER_WAIT_STEPS = 512


class Prefixes:
    """The hashes of sequences' full blocks, the pool's index of them, and the blocks on their way.

    Does nothing unless it `is_on`. The scheduler alone calls it.
    """

    def __init__(self, pool: BlockPool, hasher: BlockHasher, *, block_size: int, is_on: bool) -> None:
        self._pool = pool
        self._hasher = hasher
        self._block_size = block_size
        self._is_on = is_on
        self._computing: dict[bytes | None, Sequence] = {}  # full prompt blocks on their way, by hash

    def root(self, tenant: str) -> bytes:
        """The hash in front of a tenant's first block."""
        return self._hasher.root(tenant)

    def extend_hashes(self, sequence: Sequence, num_full: int) -> None:
        """Hash a sequence's blocks up to `num_full`: their ids are known."""
        hashes, size = sequence.block_hashes, self._block_size
        if self._is_on and len(hashes) < num_full:
            parent = hashes[-1] if hashes else sequence.root_hash
            hashes += self._hasher.chain(parent, sequence.ids[len(hashes) * size : num_full * size], block_size=size)

    def find(self, sequence: Sequence) -> list[int]:
        """Blocks of the longest indexed prefix; never the last token's, which is always computed."""
        if not self._is_on or sequence.wants_prompt_logprobs:
            return []
        hits: list[int] = []
        longest = (sequence.num_tokens - 1) // self._block_size
        for block_hash in sequence.block_hashes[:longest]:
            block = self._pool.find(block_hash)
            if block is None:
                break
            hits.append(block)
        return hits

    def begins_to_wait(self, sequence: Sequence, num_hits: int) -> bool:
        """Whether a running sequence is computing this one's next block, so that waiting saves computing it twice."""
        if not self._is_on or sequence.wants_prompt_logprobs:
            return False
        longest = min((sequence.num_tokens - 1) // self._block_size, len(sequence.block_hashes))
        sequence.awaited_hash = sequence.block_hashes[num_hits] if num_hits < longest else None
        return self.still_waits(sequence)

    def still_waits(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence's next block is still on its way. Counts the steps that it waited."""
        if sequence.awaited_hash not in self._computing or sequence.leader_waits >= MAX_LEADER_WAIT_STEPS:
            return False
        sequence.leader_waits += 1
        return True

    def start_leading(self, sequence: Sequence, num_hits: int) -> None:
        """A sequence was admitted: it computes the full blocks behind its hits, but for those on their way already."""
        for block_hash in sequence.block_hashes[num_hits:]:
            self._computing.setdefault(block_hash, sequence)

    def stop_leading(self, sequence: Sequence) -> None:
        """It leaves: what it has not computed by now is nobody's."""
        for block_hash in sequence.block_hashes[sequence.num_indexed :]:
            if self._computing.get(block_hash) is sequence:
                del self._computing[block_hash]

    def index_blocks(self, sequence: Sequence, end: int) -> None:
        """Make the blocks that a step filled up to position `end` findable: all their ids are known now."""
        num_full = min(end, len(sequence.ids)) // self._block_size
        if not self._is_on or num_full <= sequence.num_indexed:
            return
        self.extend_hashes(sequence, num_full)
        for position in range(sequence.num_indexed, num_full):
            block_hash = sequence.block_hashes[position]
            self._pool.index(sequence.block_table[position], block_hash)
            if self._computing.get(block_hash) is sequence:
                del self._computing[block_hash]
        sequence.num_indexed = num_full
