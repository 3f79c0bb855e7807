"""Select blocks in slices of queries, and let what a slice selected travel while the next one is scored.

The selections are those of all queries at once: the kernel takes each query by itself.

Shapes: T local tokens, M KV heads, Di index head dim.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from msa_train.model.inputs.pack_shard import PackShard, QuerySlice
from msa_train.parallel.comm.cp_comm import CpComm
from msa_train.parallel.kv_exchange.requests import needed_kv_blocks
from msa_train.parallel.kv_exchange.slices.side_stream import beside, join, mark
from msa_train.parallel.kv_exchange.slices.sliced_fetch import SlicedFetch
from msa_train.parallel.sharding.partition import Range, count

Select = Callable[[Tensor, Sequence[Range], Tensor | None], Tensor]
"selects for queries [n, M, Di] at the positions of ranges, some of them valid: [n, M, topk] int32"


def select_in_slices(
    q_index: Tensor, pack: PackShard, comm: CpComm, fetch: SlicedFetch, select: Select, topk: int
) -> Tensor:
    """Select for all queries that this rank computes, and give `fetch` what local queries selected.

    On a CPU a slice's requests start when it is scored, and its rows when the next one is. On a GPU all
    scoring is queued first and the rest is launched beside it, as the host must wait for requests.

    Args:
        q_index: [n, M, Di] index queries, those of other ranks among them where queries move.
        pack: of this rank.
        comm: ranks between which queries move.
        fetch: begun for this call.
        select: scores queries of some ranges.
        topk: blocks of a query.

    Returns:
        [T, M, topk] int32 block ids of the local queries, -1 for none.
    """
    device, num_kv_heads = q_index.device, q_index.shape[1]
    selected = torch.full(
        (pack.layout.local_seq_len, num_kv_heads, topk), -1, dtype=torch.int32, device=device
    )

    def score(part: QuerySlice) -> Tensor:
        if not part.ranges:
            return selected[:0]
        rows = slice(part.first_row, part.first_row + count(part.ranges))
        return select(q_index[rows], part.ranges, pack.valid[rows] if part.back is None else None)

    def ask(part: QuerySlice, found: Tensor) -> None:
        rows, found = _bring_home(part, found, pack, comm)
        selected[rows] = found
        fetch.push(needed_kv_blocks(found, pack.layout.num_blocks))

    begun = mark(device)
    if begun is None:
        for part in pack.index.slices:
            ask(part, score(part))
        return selected
    queued = [(part, score(part), mark(device)) for part in pack.index.slices]
    for part, found, scored in queued:
        with beside(device, scored):
            ask(part, found)
    join(device)
    return selected


def _bring_home(part: QuerySlice, found: Tensor, pack: PackShard, comm: CpComm) -> tuple[Tensor, Tensor]:
    """Send selections to the ranks that hold the queries: rows [n] int64 and their blocks [n, M, topk]."""
    if part.back is None:
        first = part.first_row
        return torch.arange(first, first + found.shape[0], device=found.device), found
    back = part.back
    arrived = comm.all_to_all(found[back.sent], back.send, back.receive, "index_query")
    before, after = back.kept
    rows = torch.cat((after, back.received))
    blocks = torch.cat((found[before], arrived))
    # Whoever selected did not know which of these queries are padding.
    return rows, blocks.masked_fill_(~pack.valid[rows][:, None, None], -1)
