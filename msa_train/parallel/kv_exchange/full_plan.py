"""Plan which keys and values of the whole pack each rank needs for full attention."""

from collections.abc import Sequence
from dataclasses import dataclass

from msa_train.config import KvExchange
from msa_train.parallel.sharding.load_balance import balance, balance_ring, causal_work
from msa_train.parallel.sharding.partition import Range, SequencePartition, joined, without
from msa_train.parallel.sharding.redistribute import (
    Relayout,
    TokenMoves,
    busiest_rank,
    make_moves,
    make_relayout,
)
from msa_train.parallel.sharding.shard_layout import Segment, ShardLayout, local_segments


@dataclass(slots=True)
class FullPlan:
    """How the dense attention over one pack is shared, for one rank.

    segments: of the queries that this rank computes. queries, keys: how queries, and keys with values, move
    from the layout; None: they stay. key_plan: where keys lie then. needed: positions of other ranks' keys
    that this rank's queries see; fetch: how they come, for `selected`; busiest: most tokens that a rank sends
    or receives then, known where `auto` asks for it, else 0.
    """

    segments: list[Segment]
    queries: Relayout | None
    keys: Relayout | None
    key_plan: SequencePartition
    needed: tuple[Range, ...]
    fetch: TokenMoves
    busiest: int = 0


def make_full_plan(
    layout: ShardLayout,
    cu_seqlens: Sequence[int],
    doc_lengths: Sequence[int],
    *,
    exchange: KvExchange,
    balanced: bool,
) -> FullPlan:
    """The same decisions on every rank, from the documents of the pack alone.

    Args:
        layout: this rank's shard.
        cu_seqlens, doc_lengths: block-aligned starts with the pack's length; real tokens per document.
        exchange: a ring may move keys too.
        balanced: whether queries may move, for equal work.
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
    needed = [
        without(joined((s.doc_start, s.stop) for s in parts), own)
        for parts, own in zip(segments, key_plan.ranges, strict=True)
    ]
    return FullPlan(
        segments=segments[rank],
        queries=make_relayout(home, query_plan, rank),
        keys=make_relayout(home, key_plan, rank),
        key_plan=key_plan,
        needed=needed[rank],
        fetch=make_moves(key_plan.ranges, needed, rank),
        busiest=busiest_rank(key_plan.ranges, needed) if exchange is KvExchange.auto else 0,
    )
