"""Choose the blocks that a rank's queries select: constructed to a given f, or recorded from a trained model.

f: share of the remote (block, group) pairs that some query of the rank selected. Shapes: T local tokens, M KV
groups, K top-k slots, S tokens of the pack.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.exchange.formulas import LayerShape
from msa_train.parallel.kv_exchange.requests import needed_kv_blocks
from msa_train.parallel.sharding.shard_layout import ShardLayout

RECORDED = Path(__file__).with_name("recorded_selection.npz")
TRAINED = "trained"


def select(name: str, shape: LayerShape, layout: ShardLayout) -> Tensor:
    """Return [T, M, K] int32 block ids of this rank, -1 for none; name: `trained`, or a number: f."""
    if name != TRAINED:
        return construct(float(name), shape, layout)
    recorded = torch.from_numpy(np.load(RECORDED)["block_indices"].astype(np.int32))
    return recorded[slice(*layout.ranges[0])].contiguous()


def shape_for(name: str, shape: LayerShape) -> LayerShape:
    """Take over block size, slots and length of what was recorded; constructed ones fit any shape."""
    if name != TRAINED:
        return shape
    with np.load(RECORDED) as recorded:
        seq_len, _, topk = recorded["block_indices"].shape
        return replace(shape, seq_len=seq_len, topk=topk, block_size=int(recorded["block_size"]))


def construct(f: float, shape: LayerShape, layout: ShardLayout, seed: int = 0) -> Tensor:
    """Let the queries of this rank together select exactly round(f * remote pairs) remote pairs.

    The pairs are drawn at random, the same number (give or take one) in every group; two slots of a query are
    its own block and the one before, the others go through the drawn pairs, neighbours sharing theirs. Drawn
    blocks may lie after the query: every rank bears the load that only the last rank of one long document
    has, and no rank waits for nothing.

    Raises:
        ValueError: if the queries have too few slots for so many pairs.
    """
    T, slots, M = layout.local_seq_len, shape.topk - 2, shape.num_kv_heads
    generator = torch.Generator().manual_seed(seed * 1000 + layout.cp_rank)
    mine = layout.own_blocks(torch.device("cpu"))
    blocks = torch.arange(layout.num_blocks)
    remote = blocks[~torch.isin(blocks, mine)]
    pairs = round(f * remote.numel() * M)
    own = torch.arange(*layout.ranges[0]) // layout.block_size
    before = torch.where(own > mine[0], own - 1, -1)
    groups: list[Tensor] = []
    for group in range(M):
        count = pairs // M + (group < pairs % M)
        if count > T * slots:
            raise ValueError(
                f"f={f}: {count} blocks of a group do not fit in {T} queries with {slots} remote slots; "
                "use more queries per rank or a larger topk"
            )
        drawn = remote[torch.randperm(remote.numel(), generator=generator)[:count]]
        groups.append(torch.cat((own[:, None], before[:, None], _spread(drawn, T, slots)), dim=1))
    return torch.stack(groups, dim=1).int()


def _spread(drawn: Tensor, num_queries: int, slots: int) -> Tensor:
    """Spread drawn blocks over [num_queries, slots]: each in some slot, none twice in a row; -1 for none.

    Example: [7, 8, 9], 4 queries, 1 slot -> [[7], [8], [9], [7]].
    """
    used, count = min(slots, drawn.numel()), drawn.numel()
    result = torch.full((num_queries, slots), -1, dtype=torch.int64)
    if used:
        sharing = max(1, num_queries * used // count)
        first = torch.arange(num_queries) // sharing * used
        result[:, :used] = drawn[(first[:, None] + torch.arange(used)) % count]
    return result


def remote_kv_blocks(block_indices: Tensor, layout: ShardLayout) -> Tensor:
    """Mark the pairs of each owner that the rank's queries selected, [P, M, NL] bool; not its own."""
    needed = needed_kv_blocks(block_indices, layout.num_blocks)
    by_owner = needed.view(needed.shape[0], layout.cp_size, -1).transpose(0, 1).clone()
    by_owner[layout.cp_rank] = False
    return by_owner
