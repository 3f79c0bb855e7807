"""Measure how well selected blocks cover full attention, for a few sampled queries of a pack.

Every rank scores all sampled queries against its own keys only; the parts are merged by log-sum-exp and each
query's attention mass per block goes back to the rank that holds the query. Keys stay where they are.

At 256 ranks, 1M tokens, 256 sampled queries of 64 heads and D = 128 in bf16, a rank and layer receives 4 MiB
of queries, 32 MiB of partial sums (2 numbers per head, query and rank, fp32) and 128 KiB of masses.

Shapes: Q sampled queries of the pack, C of them on this rank, M KV heads, G query heads per KV head, D head
dim, NB blocks of the pack, NL blocks per rank, B block size, P ranks, NK distance buckets.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from msa_kernels.select_blocks.op import topk_lowest_id
from torch import Tensor

from msa_train.parallel.comm.cp_comm import CpComm
from msa_train.parallel.sharding.shard_layout import ShardLayout

# Values of one score tile: 2 MiB in fp32 on a CPU, near its caches; 64 MiB on a GPU, for few launches.
_CPU_TILE, _GPU_TILE = 2**19, 2**24
# Score of a hidden key: finite, as its products with a probability of 0 must be 0.
_HIDDEN = -1e30


@dataclass(slots=True)
class RecallQueries:
    """Hold the sampled queries of a pack; all but `rows` are the same on all ranks that share it.

    Example: queries 0, 1, 2, of which rank 0 holds 0 and 2 -> by_owner [0, 2, 1], counts [2, 1].
    """

    position: Tensor
    "[Q] int64 positions in the pack, ascending"
    doc_start: Tensor
    "[Q] int64 where each query's document begins in the pack"
    rows: Tensor
    "[C] int64 this rank's queries, as rows of its local tokens"
    by_owner: Tensor
    "[Q] int64 the queries of rank 0, then of rank 1, ..., ascending for each"
    counts: list[int]
    "[P] sampled queries of each rank"
    layout: ShardLayout
    "this rank's shard of the pack"
    topk: int
    "blocks that a query selects"

    @property
    def own(self) -> Tensor:
        """Give this rank's queries among all: [C] int64.

        Example: by_owner [0, 2, 1], counts [2, 1] -> [0, 2] on rank 0, [1] on rank 1.
        """
        return self.by_owner.split(self.counts)[self.layout.cp_rank]


def sample_queries(
    cu_seqlens: Sequence[int],
    doc_lengths: Sequence[int],
    layout: ShardLayout,
    *,
    topk: int,
    count: int,
    seed: int,
) -> RecallQueries | None:
    """Draw queries that see more than `topk` blocks; the others select all they see.

    One query from each of `count` equal parts of the eligible ones. The result depends on the pack, `topk`,
    `count` and `seed` only, not on the number of ranks.

    Args:
        cu_seqlens: block-aligned document starts of the pack, with its length at the end.
        doc_lengths: real tokens of each document.
        layout: this rank's shard.
        topk: blocks that a query selects.
        count: queries of the pack, or all eligible ones where they are fewer.
        seed: of the draw.

    Returns:
        The queries, or None where no query of the pack is eligible.
    """
    # The first query of a document that sees topk + 1 blocks stands at the beginning of block topk.
    firsts = [start + topk * layout.block_size for start in cu_seqlens[:-1]]
    stops = [start + length for start, length in zip(cu_seqlens[:-1], doc_lengths, strict=True)]
    sizes = torch.tensor([max(0, stop - first) for first, stop in zip(firsts, stops, strict=True)])
    total = int(sizes.sum())
    num = min(count, total)
    if num == 0:
        return None
    # Strata: one draw from each part spreads the sample over distances, and keeps it the same for any P.
    edges = torch.arange(num + 1) * total // num
    draw = torch.rand(num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chosen = edges[:-1] + (draw * (edges[1:] - edges[:-1])).long()
    ends = sizes.cumsum(0)
    document = torch.searchsorted(ends, chosen, right=True)
    position = torch.tensor(firsts)[document] + chosen - (ends - sizes)[document]
    blocks = layout.blocks(torch.device("cpu"))
    # Of each block of the pack: its number among all blocks in rank order. Blocks [0, 3] and [1, 2] of two
    # ranks -> [0, 2, 3, 1].
    place = blocks.flatten().argsort()[position // layout.block_size]
    owner, local_block = place // layout.num_local_blocks, place % layout.num_local_blocks
    row = local_block * layout.block_size + position % layout.block_size
    return RecallQueries(
        position=position,
        doc_start=torch.tensor(cu_seqlens)[document],
        rows=row[owner == layout.cp_rank],
        by_owner=owner.argsort(stable=True),
        counts=torch.bincount(owner, minlength=layout.cp_size).tolist(),
        layout=layout,
        topk=topk,
    )


def num_buckets(num_blocks: int) -> int:
    """Count the distance buckets of a pack: 0, 1, 2-3, 4-7, ... blocks before the query's own.

    Example: 8 blocks -> 4 buckets, 0, 1, 2-3 and 4-7.
    """
    return 1 + (num_blocks - 1).bit_length()


@dataclass(slots=True)
class RecallSums:
    """Hold sums over queries, per KV head, all fp64. I* are the top-k blocks of a query by attention mass."""

    count: Tensor
    "[M] queries"
    score: Tensor
    "[M] attention mass in the selected blocks"
    entropy: Tensor
    "[M] entropy of full attention in nats, mean over the query heads of the KV head"
    best_count: Tensor
    "[M, NK] blocks of I*, by distance"
    hit_count: Tensor
    "[M, NK] blocks of I* that were selected, by distance"
    best_mass: Tensor
    "[M, NK] attention mass of the blocks of I*"
    hit_mass: Tensor
    "[M, NK] attention mass of the blocks of I* that were selected"

    def flat(self) -> Tensor:
        """Join all sums for adding up: [M, 3 + 4 NK]."""
        return torch.cat(
            (
                torch.stack((self.count, self.score, self.entropy), dim=1),
                self.best_count,
                self.hit_count,
                self.best_mass,
                self.hit_mass,
            ),
            dim=1,
        )

    @staticmethod
    def width(num_blocks: int) -> int:
        """Count the numbers per KV head in `flat`."""
        return 3 + 4 * num_buckets(num_blocks)

    @staticmethod
    def from_flat(flat: Tensor) -> "RecallSums":
        """Take `flat` apart again: [..., 3 + 4 NK] fp64."""
        buckets = (flat.shape[-1] - 3) // 4
        return RecallSums(*flat[..., :3].unbind(-1), *flat[..., 3:].split(buckets, dim=-1))


@torch.no_grad()
def measure_recall(
    q: Tensor, k: Tensor, selected: Tensor, queries: RecallQueries, comm: CpComm, *, softmax_scale: float
) -> RecallSums:
    """Compare the selection of sampled queries with their full causal attention within the document.

    Every rank of the context-parallel group must call it.

    Args:
        q: [C, M, G, D], this rank's sampled queries.
        k: [T, M, D], all keys of this rank.
        selected: [C, M, topk] int, block ids that the sampled queries select, -1 for none.
        queries: see RecallQueries.
        comm: collectives of the context-parallel group.
        softmax_scale: factor of the scores.

    Returns:
        Sums over this rank's sampled queries; added over ranks they do not depend on the number of ranks.

    Raises:
        ExchangeError: a collective failed.

    Source: arXiv 2606.13392 appendix A (block recall and score recall).
    """
    every = _gather_rows(q, queries, comm)
    part = _score_own_keys(every, k, queries, softmax_scale)
    total, entropy = _merge(part, comm)
    # Mass of a block: its share e^(lse of block - lse of all) of the softmax, mean over the KV head's heads.
    mass = part.block_lse.sub_(total[:, None]).exp_().mean(2)
    mass = _send_home(mass.permute(2, 0, 1), queries, comm)
    return _sums(mass, selected.long(), entropy[queries.own], queries)


@dataclass(slots=True)
class _OwnKeys:
    """Hold the attention of all sampled queries to this rank's keys, per query head; fp32 (fp64 for fp64)."""

    block_lse: Tensor
    "[M, NL, G, Q] log-sum-exp of the scores of each block"
    lse: Tensor
    "[M, G, Q] log-sum-exp of the scores of all these keys"
    score: Tensor
    "[M, G, Q] mean score under the softmax over these keys"


def _score_own_keys(q: Tensor, k: Tensor, queries: RecallQueries, softmax_scale: float) -> _OwnKeys:
    """Score all sampled queries against own keys.

    Keys are the rows of each product, so that sums over a block run along whole vectors of queries.
    """
    layout, (Q, M, G, D) = queries.layout, q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q = (q.to(dtype) * softmax_scale).permute(1, 2, 3, 0)
    block_lse = q.new_full((M, layout.num_local_blocks, G, Q), float("-inf"))
    lse, score = block_lse.new_full((M, G, Q), float("-inf")), block_lse.new_zeros(M, G, Q)
    own_blocks, offset = layout.own_blocks(q.device), torch.arange(layout.block_size, device=q.device)
    for seeing, blocks in _tiles(queries, M * G):
        keys = k[blocks.start * layout.block_size : blocks.stop * layout.block_size]
        keys = keys.to(dtype).transpose(0, 1)
        columns = q[..., seeing].transpose(1, 2).reshape(M, D, -1)
        scores = (keys @ columns).view(M, -1, layout.block_size, G, seeing.stop - seeing.start)
        token = (own_blocks[blocks, None] * layout.block_size + offset).view(-1, 1)
        hidden = (token > queries.position[seeing]) | (token < queries.doc_start[seeing])
        scores.masked_fill_(hidden.view(1, -1, layout.block_size, 1, hidden.shape[1]), _HIDDEN)
        peak = scores.amax(2)
        # Mean score under the softmax of a block: sum p s / sum p; it gives the entropy without another pass.
        p = (scores - peak[:, :, None]).exp_()
        weight = p.sum(2)
        mean = p.mul_(scores).sum(2).div_(weight)
        tile_lse = weight.log_().add_(peak).masked_fill_(peak <= _HIDDEN, float("-inf"))
        block_lse[:, blocks, :, seeing] = tile_lse
        merged = torch.cat((lse[:, None, :, seeing], tile_lse), dim=1)
        means = torch.cat((score[:, None, :, seeing], mean), dim=1)
        lse[..., seeing], score[..., seeing] = _mean_score(merged, means, dim=1)
    return _OwnKeys(block_lse=block_lse, lse=lse, score=score)


def _tiles(queries: RecallQueries, num_heads: int) -> Iterator[tuple[slice, slice]]:
    """Yield (queries, own blocks) of which some see each other; such queries are a run of the list.

    Example: queries at 4 and 9, blocks 1 and 2 of 4 tokens, one block per tile -> (0 to 1, block 1) and (1,
    block 2): the query at 4 sees nothing of block 2.
    """
    layout = queries.layout
    position, doc_start = queries.position.tolist(), queries.doc_start.tolist()
    elements = _GPU_TILE if queries.position.is_cuda else _CPU_TILE
    step = max(1, elements // (len(position) * num_heads * layout.block_size))
    own_blocks = layout.own_blocks(torch.device("cpu")).tolist()
    for first in range(0, layout.num_local_blocks, step):
        stop = min(first + step, layout.num_local_blocks)
        # Blocks between those of a tile may lie elsewhere: then a few queries see none of the tile.
        begin, end = own_blocks[first] * layout.block_size, (own_blocks[stop - 1] + 1) * layout.block_size
        seeing = [i for i in range(len(position)) if position[i] >= begin and doc_start[i] < end]
        if seeing:
            yield slice(seeing[0], seeing[-1] + 1), slice(first, stop)


def _mean_score(lse: Tensor, score: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Merge parts of a softmax along `dim`: their log-sum-exp, and their mean scores weighted by it."""
    total = lse.logsumexp(dim, keepdim=True)
    # Where nothing is visible yet both are -inf; any finite reference gives weight 0.
    weight = (lse - total.masked_fill(total == float("-inf"), 0.0)).exp_()
    return total.squeeze(dim), (weight * score.masked_fill(weight == 0, 0.0)).sum(dim)


def _merge(part: _OwnKeys, comm: CpComm) -> tuple[Tensor, Tensor]:
    """Merge over ranks: lse [M, G, Q] over all keys, entropy of full attention [Q, M], mean over heads."""
    gathered = comm.all_gather(torch.stack((part.lse, part.score)), "recall")
    lse, score = _mean_score(gathered[:, 0], gathered[:, 1], dim=0)
    # Entropy = -sum_j p_j log p_j with log p_j = score_j - lse: lse minus the mean score under p.
    return lse, (lse - score).mean(1).T


def _gather_rows(x: Tensor, queries: RecallQueries, comm: CpComm) -> Tensor:
    """Gather rows of sampled queries into the order of the pack: [C, ...] of every rank -> [Q, ...].

    Example: by_owner [0, 2, 1], counts [2, 1]: rows a, c of rank 0 and b of rank 1 arrive as [[a, c], [b, 0]]
    and become [a, b, c].
    """
    counts = queries.counts
    # An all-gather takes one size from all ranks.
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: x.shape[0]] = x
    gathered = comm.all_gather(padded, "recall")
    by_owner = torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])
    return by_owner[queries.by_owner.argsort()]


def _send_home(mass: Tensor, queries: RecallQueries, comm: CpComm) -> Tensor:
    """Send masses to the queries' ranks: own blocks [Q, M, NL] -> all blocks of own queries [C, M, NB].

    Example: counts [2, 1]; rank 0 sends the first two rows by owner to itself and the third to rank 1, which
    gets one row from each rank and puts their blocks where they belong.
    """
    layout, own = queries.layout, queries.counts[queries.layout.cp_rank]
    received = comm.all_to_all(mass[queries.by_owner], queries.counts, [own] * layout.cp_size, "recall")
    received = received.view(layout.cp_size, own, *mass.shape[1:]).permute(1, 2, 0, 3).flatten(2)
    return received[..., layout.blocks(mass.device).flatten().argsort()]


def _sums(mass: Tensor, selected: Tensor, entropy: Tensor, queries: RecallQueries) -> RecallSums:
    """Sum mass [C, M, NB], selected [C, M, topk] and entropy [C, M] of this rank's queries over queries.

    Example: the query's own block 6; blocks 6, 5, 3 and 1 of I* are 0, 1, 3 and 5 before it -> buckets 0, 1,
    2 and 3.
    """
    layout, device, (C, M, _) = queries.layout, mass.device, mass.shape
    own = queries.position[queries.own, None] // layout.block_size
    first = queries.doc_start[queries.own, None] // layout.block_size
    block = torch.arange(layout.num_blocks, device=device)
    hidden = (block < first) | (block > own)
    # Blocks that a query cannot see may not fill I*.
    ranked = mass.masked_fill(hidden[:, None], float("-inf")).flatten(0, 1)
    best = topk_lowest_id(ranked, queries.topk).view(C, M, queries.topk)
    best_mass = mass.gather(2, best).double()
    hit = (best[..., None] == selected[..., None, :]).any(-1).double()
    # Empty slots (-1) read block 0 and count nothing.
    covered = mass.gather(2, selected.clamp(min=0)).double() * (selected >= 0)
    buckets = num_buckets(layout.num_blocks)
    # Distances 0, 1, 2-3, 4-7, ... lie between the borders 1, 2, 4, 8, ...
    bucket = torch.bucketize(own[..., None] - best, 2 ** torch.arange(buckets - 1, device=device), right=True)

    def by_distance(values: Tensor) -> Tensor:
        """Sum values [C, M, topk] of the best blocks by distance -> [M, NK]."""
        totals = torch.zeros(M, buckets, dtype=torch.float64, device=device)
        return totals.scatter_add_(1, bucket.transpose(0, 1).flatten(1), values.transpose(0, 1).flatten(1))

    return RecallSums(
        count=torch.full((M,), float(C), dtype=torch.float64, device=device),
        score=covered.sum((0, 2)),
        entropy=entropy.double().sum(0),
        best_count=by_distance(torch.ones_like(hit)),
        hit_count=by_distance(hit),
        best_mass=by_distance(best_mass),
        hit_mass=by_distance(best_mass * hit),
    )
