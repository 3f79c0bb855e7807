"""Plan which keys and values of the whole pack each rank needs for full attention.

Every rank plans for all ranks. At 1M tokens on 256 ranks: work of 32,768 units of 32 tokens, segments of 256
ranks, and 8 bytes for every token that this rank sends or fetches, 8 MiB on the last rank of a document. With
`auto` the shares of all 65,536 pairs of ranks are counted too. That takes about 0.1 s of a CPU core, with
`auto` 1 s.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from msa_train.config import KvExchange
from msa_train.parallel.sharding.load_balance import balance, balance_ring, causal_work
from msa_train.parallel.sharding.partition import Range, SequencePartition, joined, without
from msa_train.parallel.sharding.redistribute import (
    Redistribution,
    TokenMoves,
    busiest_rank,
    make_moves,
    plan_redistribution,
)
from msa_train.parallel.sharding.shard_layout import Segment, ShardLayout, local_segments


@dataclass(slots=True)
class FullPlan:
    """Hold how full attention over one pack is shared, for one rank."""

    segments: list[Segment]
    "document parts among the queries that this rank computes"
    queries: Redistribution | None
    "how queries move from the layout; None: they stay"
    keys: Redistribution | None
    "how keys and values move from the layout; None: they stay"
    key_plan: SequencePartition
    "where keys lie then"
    needed: tuple[Range, ...]
    "positions of other ranks' keys that this rank's queries see"
    fetch: TokenMoves
    "how the needed keys come, for `selected`"
    busiest: int = 0
    "most tokens that a rank sends or receives with `selected`; 0 where `auto` does not ask"
    pieces: dict[Any, Any] = field(init=False, default_factory=dict, repr=False)
    "kernel calls by source of keys, planned by the first layer that makes them"


def make_full_plan(
    layout: ShardLayout,
    cu_seqlens: Sequence[int],
    doc_lengths: Sequence[int],
    *,
    exchange: KvExchange,
    balanced: bool,
) -> FullPlan:
    """Plan full attention over a pack; the same decisions on every rank, from its documents alone.

    Args:
        layout: this rank's shard.
        cu_seqlens: block-aligned document starts of the pack, with its length at the end.
        doc_lengths: real tokens of each document.
        exchange: way of the exchange; a ring may move keys too.
        balanced: queries may move, for equal work.

    Example: one document of 8 tokens on 2 ranks, not balanced: rank 0 needs nothing, rank 1 needs positions
    [(0, 4)].
    """
    rank, home = layout.cp_rank, layout.plan
    query_plan = key_plan = home
    if balanced and layout.cp_size > 1:
        work, document = causal_work(cu_seqlens, doc_lengths, layout.block_size)
        if exchange is KvExchange.ring:
            query_plan, key_plan = balance_ring(home, work, document)
        else:
            query_plan = balance(home, work, document)
    segments = [local_segments(cu_seqlens, doc_lengths, ranges) for ranges in query_plan.ranges]
    # Keys from each document's start up to the last query that a rank has in it, less what it holds.
    needed = [
        without(joined((s.doc_start, s.stop) for s in parts), own)
        for parts, own in zip(segments, key_plan.ranges, strict=True)
    ]
    return FullPlan(
        segments=segments[rank],
        queries=plan_redistribution(home, query_plan, rank),
        keys=plan_redistribution(home, key_plan, rank),
        key_plan=key_plan,
        needed=needed[rank],
        fetch=make_moves(key_plan.ranges, needed, rank),
        busiest=busiest_rank(key_plan.ranges, needed) if exchange is KvExchange.auto else 0,
    )
