"""Cut one rank's share out of a pack, as tensors the layers read."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from msa_train.config import ParallelConfig
from msa_train.data import Pack
from msa_train.parallel.kv_exchange.full_plan import FullPlan, make_full_plan
from msa_train.parallel.sharding.load_balance import balance, cut_in_slices, index_work
from msa_train.parallel.sharding.partition import Range, count
from msa_train.parallel.sharding.redistribute import (
    Redistribution,
    TokenMoves,
    make_moves,
    plan_redistribution,
)
from msa_train.parallel.sharding.shard_layout import ShardLayout


@dataclass(slots=True)
class QuerySlice:
    """Hold one slice of the queries that this rank selects blocks for."""

    ranges: tuple[Range, ...]
    "their positions in the pack, ascending"
    first_row: int
    "row among all queries that this rank selects for"
    back: TokenMoves | None
    "how their selections go to the ranks that hold them; None: they are here, in the same rows"


@dataclass(slots=True)
class IndexSharding:
    """Hold the queries that this rank selects blocks for."""

    ranges: tuple[Range, ...]
    "their positions in the pack, ascending"
    moves: Redistribution | None
    "how index queries come here and selections go back; None: no rank's queries move"
    slices: list[QuerySlice] = field(default_factory=list)
    "the same queries in slices of equal work; empty where they select in one piece"


@dataclass(slots=True)
class PackShard:
    """Hold the tokens of one rank and where they lie. T local tokens.

    Example: documents of 3 and 4 tokens in slots [0, 4) and [4, 8), rank 1 of 2: position [4, 5, 6, 7],
    doc_position [0, 1, 2, 3], all valid; on rank 0 position 3 is padding.
    """

    layout: ShardLayout
    "the tokens of every rank"
    tokens: Tensor
    "[T] int64 token ids"
    labels: Tensor
    "[T] int64 next token ids; IGNORE_LABEL where there is none"
    position: Tensor
    "[T] int64 positions in the pack, ascending"
    doc_position: Tensor
    "[T] int64 positions in the token's document"
    valid: Tensor
    "[T] bool, False for padding"
    cu_seqlens: Tensor
    "[num_docs + 1] int64 document starts of the whole pack, with its length at the end"
    index: IndexSharding
    "how the ranks share the block selection"
    full: FullPlan | None
    "how the ranks share full attention; None: no layer has it"


def make_pack_shard(
    pack: Pack, layout: ShardLayout, parallel: ParallelConfig, *, with_full: bool, num_slices: int = 1
) -> PackShard:
    """Cut this rank's shard out of a pack that every rank of the context-parallel group holds; on the host.

    Args:
        pack: the whole pack.
        layout: which tokens this rank holds.
        parallel: exchange and balancing.
        with_full: plan full attention too, which takes time with many ranks.
        num_slices: slices in which queries select blocks.
    """
    cu_seqlens, doc_lengths = pack.cu_seqlens.tolist(), pack.doc_lengths.tolist()
    position = torch.cat([torch.arange(start, stop) for start, stop in layout.ranges])
    starts = torch.tensor(cu_seqlens)
    document = torch.searchsorted(starts, position, right=True) - 1
    doc_position = position - starts[document]
    # Slots are block-aligned: what lies behind a document's last token in its slot is padding.
    valid = doc_position < torch.tensor(doc_lengths)[document]
    full = None
    if with_full:
        full = make_full_plan(
            layout,
            cu_seqlens,
            doc_lengths,
            exchange=parallel.kv_exchange,
            balanced=parallel.balance_full_attention,
        )
    return PackShard(
        layout=layout,
        tokens=_cut(pack.tokens, layout),
        labels=_cut(pack.labels, layout),
        position=position,
        doc_position=doc_position,
        valid=valid,
        cu_seqlens=starts,
        index=_index_sharding(layout, cu_seqlens, parallel, num_slices),
        full=full,
    )


def _cut(values: npt.NDArray[np.int64], layout: ShardLayout) -> Tensor:
    parts = [torch.from_numpy(values[start:stop]) for start, stop in layout.ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _index_sharding(
    layout: ShardLayout, cu_seqlens: Sequence[int], parallel: ParallelConfig, num_slices: int
) -> IndexSharding:
    # Queries of documents' ends score more blocks than those of their beginnings.
    away, work = layout.plan, index_work(cu_seqlens, layout.block_size)
    if parallel.balance_index and layout.cp_size > 1:
        away = balance(layout.plan, *work)
    moves = plan_redistribution(layout.plan, away, layout.cp_rank)
    sharding = IndexSharding(ranges=away.ranges[layout.cp_rank], moves=moves)
    if num_slices > 1:
        row = 0
        for part in cut_in_slices(away, work[0], num_slices):
            ranges = part.ranges[layout.cp_rank]
            back = None if moves is None else make_moves(part.ranges, layout.plan.ranges, layout.cp_rank)
            sharding.slices.append(QuerySlice(ranges, row, back))
            row += count(ranges)
    return sharding
