"""Hold the owner of every block of a pack, for every sequence layout, as whole-pack arrays."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msa_train.parallel.sharding.partition import SequencePartition

IntArray = NDArray[np.int64]


@dataclass(slots=True, frozen=True)
class Placement:
    """Hold the owner of every block, the same number of blocks on each rank.

    Example: documents of 12 and 4 tokens in blocks of 2, zigzag on 2 ranks: owner [0, 0, 1, 1, 1, 1, 0, 0],
    order [[0, 1, 6, 7], [2, 3, 4, 5]], doc_start [0, 0, 0, 0, 0, 0, 6, 6].
    """

    seq_len: int
    "tokens of the pack"
    block_size: int
    "tokens per block"
    cp_size: int
    "P, or P' Ulysses groups"
    owner: IntArray
    "[NB] int64, rank of each block"
    order: IntArray
    "[P, NL] int64, blocks of each rank, ascending"
    doc_start: IntArray
    "[NB] int64, first block of the document that a block belongs to"
    plan: SequencePartition
    "the same as ranges of positions"
    cu_seqlens: list[int]
    "[num_docs + 1] document starts and the pack's length, tokens"

    @property
    def num_blocks(self) -> int:
        """Return NB, blocks of the pack."""
        return self.owner.shape[0]

    @property
    def local_seq_len(self) -> int:
        """Return the tokens of each rank."""
        return self.seq_len // self.cp_size

    def tiles(self, topk: int) -> IntArray:
        """Count [P] (query, block) pairs that a rank's queries select per KV head: topk, fewer at the start.

        Example: blocks of 2 tokens, topk 2, one document of 6 tokens on one rank -> 2 * (1 + 2 + 2).
        """
        # blocks from the document's first one up to the query's own; a query's tiles do not depend on its
        # place in the block, as blocks are counted whole
        visible = np.arange(self.num_blocks, dtype=np.int64) - self.doc_start + 1
        return (np.minimum(visible, topk) * self.block_size)[self.order].sum(axis=1)

    def visible_remote(self) -> IntArray:
        """Count [P] blocks of other ranks that some query of a rank may see.

        Example: 8 blocks contiguous on 4 ranks, one document -> [0, 2, 4, 6].
        """
        return np.array([int(self.visible(rank).sum()) for rank in range(self.cp_size)], dtype=np.int64)

    def visible(self, rank: int) -> NDArray[np.bool_]:
        """Mark the [NB] blocks that a query of `rank` may see, own blocks left out.

        Example: 8 blocks contiguous on 4 ranks, rank 1 -> [1, 1, 0, 0, 0, 0, 0, 0].
        """
        own = self.order[rank]
        # union of the intervals [document start, own block): +1 where one begins, -1 where it ends, summed up
        change = np.zeros(self.num_blocks + 1, dtype=np.int64)
        np.add.at(change, self.doc_start[own], 1)
        np.add.at(change, own, -1)
        seen = change[:-1].cumsum() > 0
        # a document's later own blocks make earlier ones visible too, and these are no remote blocks
        seen[own] = False
        return seen
