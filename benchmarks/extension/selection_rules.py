"""Select blocks by other rules than the model's own, to see what they would send and what they would cost.

    neighbours   some neighbouring queries share one selection: the blocks with most of their attention,
                 by the index branch; blocks of the neighbours themselves come on top of these
    bonus        a rank goes through its queries in eight slices; blocks that earlier slices have fetched
                 get a bonus on their scores

Both are studies for one process that holds the whole pack. They take the place of `MsaSelfAttention._select`
inside `applied`; nothing else knows of them.

Shapes: T tokens of the pack, M KV heads, NB blocks, Di index head dim.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from msa_train.model.attention.msa import MsaSelfAttention
from msa_train.model.inputs.pack_params import PackContext

_SLICES = 8
_TILE = 512
"queries whose scores are in memory at a time: 512 * M * NB * 4 bytes, 5 MB at 10K tokens in blocks of 8"


@dataclass(frozen=True, slots=True)
class Rule:
    """Say how blocks are selected."""

    neighbours: int = 1
    "queries that share a selection; divides the tokens of a rank"
    bonus: float = 0.0
    "nats, on the logits of the index branch, for blocks that the rank has fetched"
    cp_size: int = 16
    "ranks that the pack is thought to lie on, for the bonus"

    @property
    def name(self) -> str:
        """Return what tables call it."""
        if self.neighbours > 1:
            return f"{self.neighbours} neighbours share"
        return f"bonus {self.bonus:g}" if self.bonus else "the model's own"


@dataclass(frozen=True, slots=True)
class Geometry:
    """Hold what a selection depends on besides queries and keys."""

    cu_seqlens: Tensor
    "[num_docs + 1] document starts"
    block_size: int
    "tokens of a block"
    topk: int
    "blocks of a query"
    local_blocks: int
    "blocks up to the query's own that are always selected"


def block_logits(q_index: Tensor, k_index: Tensor, start: int, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Score blocks for queries from position `start` on.

    Returns:
        [n, M, NB] logits, -inf for blocks that a query does not see; [n, NB] bool, blocks that it must take.
    """
    size = geometry.block_size
    num_queries, num_blocks = q_index.shape[0], k_index.shape[0] // size
    token = torch.einsum("nmd,td->nmt", q_index, k_index) * q_index.shape[-1] ** -0.5
    logits = token.unflatten(-1, (num_blocks, size)).amax(-1)
    position = torch.arange(start, start + num_queries)
    starts = geometry.cu_seqlens.long()
    doc_start = starts[torch.searchsorted(starts, position, right=True) - 1]
    block, own = torch.arange(num_blocks), position[:, None] // size
    hidden = (block > own) | (block < doc_start[:, None] // size)
    forced = (block > own - geometry.local_blocks) & ~hidden
    return logits.masked_fill(hidden[:, None], float("-inf")), forced


def select(rule: Rule, q_index: Tensor, k_index: Tensor, geometry: Geometry) -> Tensor:
    """Select blocks for all queries of a pack.

    q_index: [T, M, Di]; k_index: [T, Di] -> [T, M, K] int32, -1 for none; K is topk, and more with
    neighbours: their own blocks.
    """
    q_index, k_index = q_index.float(), k_index.float()
    if rule.neighbours > 1:
        return _shared(rule.neighbours, q_index, k_index, geometry)
    num_tokens, num_heads, _ = q_index.shape
    num_blocks = k_index.shape[0] // geometry.block_size
    shard = num_tokens // rule.cp_size
    step = max(min(shard // _SLICES, _TILE), 1)
    parts: list[Tensor] = []
    fetched = torch.zeros(num_heads, num_blocks, dtype=torch.bool)
    for start in range(0, num_tokens, step):
        rank = start // shard
        if start % shard == 0:
            fetched = torch.zeros(num_heads, num_blocks, dtype=torch.bool)
            here = torch.arange(num_blocks) * geometry.block_size // shard == rank
            fetched |= here
        logits, forced = block_logits(q_index[start : start + step], k_index, start, geometry)
        logits = logits + rule.bonus * fetched
        logits.masked_fill_(forced[:, None], float("inf"))
        chosen = _top(logits, geometry.topk)
        parts.append(chosen)
        fetched |= as_mask(chosen, num_blocks).any(0)
    return torch.cat(parts).int()


def _shared(neighbours: int, q_index: Tensor, k_index: Tensor, geometry: Geometry) -> Tensor:
    """Let neighbours share the blocks before them that hold most of their attention together."""
    size, parts = geometry.block_size, list[Tensor]()
    for start in range(0, q_index.shape[0], neighbours):
        logits, _ = block_logits(q_index[start : start + neighbours], k_index, start, geometry)
        first, count = start // size, -(-neighbours // size)
        mass = logits.softmax(-1).sum(0)
        mass[:, first:] = float("-inf")
        mass.masked_fill_(mass == 0, float("-inf"))
        chosen = _top(mass, geometry.topk).expand(len(logits), -1, -1)
        own = torch.arange(first, first + count).expand(*chosen.shape[:2], -1)
        both = torch.cat([chosen, own], -1)
        # what a query does not see, of another document or behind it, it does not take
        seen = logits.gather(-1, both.clamp(min=0)) > float("-inf")
        parts.append(both.masked_fill(~seen, -1).sort(-1, descending=True).values)
    return torch.cat(parts).int()


def _top(logits: Tensor, topk: int) -> Tensor:
    """Return ids of the `topk` largest, -1 where there are fewer that are seen."""
    values, ids = logits.topk(min(topk, logits.shape[-1]), -1)
    return ids.masked_fill(values == float("-inf"), -1)


def as_mask(block_indices: Tensor, num_blocks: int) -> Tensor:
    """Mark blocks: [..., K] ids, -1 for none -> [..., NB] bool."""
    index = block_indices.long()
    mask = torch.zeros(*index.shape[:-1], num_blocks + 1, dtype=torch.bool)
    return mask.scatter_(-1, torch.where(index < 0, num_blocks, index), True)[..., :-1]


@contextmanager
def applied(rule: Rule | None, on_selection: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Let all MSA layers of this process select by a rule; None: as they do.

    on_selection: is told a layer's number and its selection [T, M, K] of each pack.
    """
    own = MsaSelfAttention._select

    def replaced(
        layer: MsaSelfAttention, q_index: Tensor, all_keys: Tensor, context: PackContext, fetch: Any = None
    ) -> Tensor:
        if rule is None:
            selected = own(layer, q_index, all_keys, context, fetch)
        else:
            attention = layer.config.attention
            geometry = Geometry(
                context.pack.cu_seqlens, attention.block_size, context.topk, attention.local_blocks
            )
            selected = select(rule, q_index.detach(), all_keys, geometry)
            selected.masked_fill_(~context.pack.valid[:, None, None], -1)
        on_selection(layer.layer_number, selected)
        return selected

    setattr(MsaSelfAttention, "_select", replaced)  # noqa: B010  it is a method of the class
    try:
        yield
    finally:
        MsaSelfAttention._select = own
