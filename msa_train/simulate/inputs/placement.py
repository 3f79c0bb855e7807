"""Which rank holds which blocks of a pack, for every sequence layout, as whole-pack arrays."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msa_train.parallel.sharding.partition import SequencePartition

IntArray = NDArray[np.int64]


@dataclass(slots=True, frozen=True)
class Placement:
    """Owner of every block, the same number of blocks on each rank.

    owner: [NB] rank per block. order: [P, NL] blocks of each rank, ascending. doc_start: [NB] first block
    of the document that a block belongs to. plan: the same as ranges of positions. cu_seqlens: document
    starts and the pack's length.
    """

    seq_len: int
    block_size: int
    cp_size: int
    owner: IntArray
    order: IntArray
    doc_start: IntArray
    plan: SequencePartition
    cu_seqlens: list[int]

    @property
    def num_blocks(self) -> int:
        """Blocks of the pack."""
        return self.owner.shape[0]

    @property
    def local_seq_len(self) -> int:
        """Tokens of each rank."""
        return self.seq_len // self.cp_size

    def tiles(self, topk: int) -> IntArray:
        """[P] (query, block) pairs that one group's queries of a rank select: topk each, fewer at the start.

        Example: blocks of 2 tokens, topk 2, one document of 6 tokens on one rank -> 2 * (1 + 2 + 2).
        """
        visible = np.arange(self.num_blocks, dtype=np.int64) - self.doc_start + 1
        return (np.minimum(visible, topk) * self.block_size)[self.order].sum(axis=1)

    def visible_remote(self) -> IntArray:
        """[P] blocks of other ranks that some query of a rank may see."""
        return np.array([int(self.visible(rank).sum()) for rank in range(self.cp_size)], dtype=np.int64)

    def visible(self, rank: int) -> NDArray[np.bool_]:
        """[NB] whether a query of `rank` may see the block, own blocks left out."""
        own = self.order[rank]
        change = np.zeros(self.num_blocks + 1, dtype=np.int64)
        np.add.at(change, self.doc_start[own], 1)
        np.add.at(change, own, -1)
        seen = change[:-1].cumsum() > 0
        seen[own] = False
        return seen
