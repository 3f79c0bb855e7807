"""Run one MSA layer's exchange and attention, forward and backward, on one rank: the work that is measured.

Projections, selection and everything outside the attention are left out; they are the same in every scheme.
Shapes: T local tokens, M KV groups, G query heads per group, D head dim, Di index head dim, K top-k slots.
"""

import math
import time
from dataclasses import dataclass

import torch
from msa_kernels.block_sparse_attention.op import pack_blocks
from torch import Tensor

from benchmarks.exchange.demand import Wants, demand_bytes
from benchmarks.exchange.formulas import (
    LayerShape,
    all_gather_bytes,
    all_reduce_bytes,
    request_bytes,
    ring_bytes,
)
from benchmarks.exchange.schemes import KeepAndAllReduce, Scheme
from benchmarks.exchange.selections import select, shape_for
from msa_train.config import KvExchange
from msa_train.parallel.attention.cp_sparse import SparseAttentionArgs, cp_sparse_attention
from msa_train.parallel.comm.cp_groups import KvComm
from msa_train.parallel.kv_exchange.requests import needed_kv_blocks
from msa_train.parallel.kv_exchange.slices.begin import Begun, EarlyGather, begin_exchange
from msa_train.parallel.kv_exchange.slices.sliced_fetch import SlicedFetch
from msa_train.parallel.sharding.shard_layout import ShardLayout

INPUTS = ("q", "k", "v", "q_index", "k_index")


@dataclass(slots=True)
class LayerData:
    """Hold one rank's tensors, fp32."""

    shape: LayerShape
    "of the whole layer"
    layout: ShardLayout
    "tokens of this rank"
    tensors: dict[str, Tensor]
    "q [T, M, G, D], k and v [T, M, D], q_index [T, M, Di], k_index [T, Di], by name"
    dout: Tensor
    "[T, M, G, D], gradient of the output"
    block_indices: Tensor
    "[T, M, K] int32 block ids of the pack, -1 for none"
    position: Tensor
    "[T] int64, of this rank's tokens in the pack"


def make_layer(selection: str, shape: LayerShape, cp_rank: int, cp_size: int) -> LayerData:
    """Draw the same numbers for the same rank, whatever the scheme; selection: see `select`."""
    shape = shape_for(selection, shape)
    layout = ShardLayout(seq_len=shape.seq_len, block_size=shape.block_size, cp_rank=cp_rank, cp_size=cp_size)
    T, M, D, Di = layout.local_seq_len, shape.num_kv_heads, shape.head_dim, shape.index_head_dim
    heads = (T, M, shape.heads_per_group, D)
    sizes = dict(zip(INPUTS, (heads, (T, M, D), (T, M, D), (T, M, Di), (T, Di)), strict=True))
    generator = torch.Generator().manual_seed(cp_rank)
    return LayerData(
        shape=shape,
        layout=layout,
        tensors={name: torch.randn(size, generator=generator) for name, size in sizes.items()},
        dout=torch.randn(heads, generator=generator),
        block_indices=select(selection, shape, layout),
        position=torch.arange(*layout.ranges[0]),
    )


@dataclass(slots=True)
class StepResult:
    """Hold what one step gives."""

    tensors: dict[str, Tensor]
    """"out", and the gradients of all inputs as "dq", "dk" and so on"""
    used: KvExchange
    "exchange that the layer took, which `auto` chooses"
    by_node: bool
    "selected KV blocks crossed the network once per node, which `auto_sliced` chooses"


def layer_step(data: LayerData, scheme: Scheme, comm: KvComm, scoring_s: float = 0.0) -> StepResult:
    """Run forward and backward once.

    scoring_s: how long this rank waits in the place of scoring blocks. A GPU that scores takes no processor
    from what moves the bytes, so the stand-in sleeps.
    """
    inputs = {name: x.detach().requires_grad_() for name, x in data.tensors.items()}
    shape = data.shape
    all_keys = comm.all_gather(data.tensors["k_index"], "index_key").flatten(0, 1)
    call = SparseAttentionArgs(
        block_indices=data.block_indices,
        position=data.position,
        layout=data.layout,
        comm=comm,
        exchange=scheme.exchange,
        softmax_scale=shape.head_dim**-0.5,
        index_scale=shape.index_head_dim**-0.5,
        k_index=all_keys.view(-1, shape.block_size, shape.index_head_dim) if shape.with_kl else None,
        kl_weight=float(shape.with_kl),
        # as in a step that is logged
        on_kl=lambda value: None,
        settings=scheme.settings,
        begun=_score(data, scheme, comm, scoring_s),
    )
    del all_keys
    out, decision = cp_sparse_attention(*(inputs[name] for name in INPUTS), call)
    out.backward(data.dout)
    grads = {f"d{name}": x.grad for name, x in inputs.items() if x.grad is not None}
    by_node = decision.plan is not None and len(decision.plan.hops) > 1
    return StepResult({"out": out.detach(), **grads}, decision.kind, by_node)


def _score(data: LayerData, scheme: Scheme, comm: KvComm, scoring_s: float) -> Begun | None:
    """Let the time of scoring pass, in slices where the scheme selects in slices; returns what began."""
    begun, slices = None, 1
    if scheme.early:
        slices = max(1, scheme.settings.query_slices)
        k, v, k_index = (data.tensors[name] for name in ("k", "v", "k_index"))
        begun = begin_exchange(
            scheme.exchange,
            pack_blocks(k, v, data.shape.block_size),
            k_index,
            data.layout,
            comm,
            scheme.settings,
            num_slices=slices,
            with_backward=True,
        )
    if not isinstance(begun, SlicedFetch):
        time.sleep(scoring_s)
        if isinstance(begun, EarlyGather):
            begun.selected(needed_kv_blocks(data.block_indices, data.layout.num_blocks))
        return begun
    for rows in data.block_indices.chunk(slices):
        time.sleep(scoring_s / slices)
        begun.push(needed_kv_blocks(rows, data.layout.num_blocks))
    return begun


def expected_bytes(
    shape: LayerShape, scheme: Scheme, used: KvExchange, wanted: Tensor, ranks_per_node: int
) -> list[dict[str, int]]:
    """Count the bytes that every rank should receive, by purpose.

    Args:
        shape: of the layer.
        scheme, used: the scheme and the exchange that it took.
        wanted: [P, P, NP] bool, pairs by requester and owner.
        ranks_per_node: of the exchange that it took; 0: none.
    """
    size = wanted.shape[0]
    if used is KvExchange.selected:
        wants = Wants(wanted, ranks_per_node, scheme.settings.hot_share)
        rows = demand_bytes(shape, wants)
        slices = scheme.settings.query_slices if scheme.early else 1
        rows = [{**row, "request": row["request"] * slices} for row in rows]
        if not scheme.settings.keep_for_backward:
            rows = [{**row, "kv_again": row["kv"]} for row in rows]
        return rows
    if used is KvExchange.ring:
        return [ring_bytes(shape, size)] * size
    if scheme.comm is KeepAndAllReduce:
        return [all_reduce_bytes(shape, size)] * size
    asked = {"request": request_bytes(shape, size)} if scheme.exchange is KvExchange.auto else {}
    return [{**all_gather_bytes(shape, size), **asked}] * size


def worst_row_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Find the largest |found - wanted| / |wanted| over the rows (last dimension) of all tensors; 0 / 0 is 0.

    By row, not over a whole tensor: one lost block of one query would hardly change the norm of all.
    """
    worst = 0.0
    for name, reference in wanted.items():
        reference = reference.double()
        difference, size = (found[name].double() - reference).norm(dim=-1), reference.norm(dim=-1)
        error = torch.where(difference == 0, 0.0, difference / size).max()
        # A row that should be zero and is not, or is NaN, must not pass as small.
        worst = max(worst, float(error.nan_to_num(nan=math.inf, posinf=math.inf)))
    return worst
