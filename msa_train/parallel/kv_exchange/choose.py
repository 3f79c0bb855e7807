"""Choose the way that brings remote KV blocks to the queries, and their gradients back to the owners.

Each gives the same numbers: `selected`, `all_gather`, `ring`, each a module here; `auto` takes one of the
first two for each call.
"""

import torch
from torch import Tensor

from msa_train.config import ExchangeConfig, KvExchange
from msa_train.parallel.comm.cp_comm import Pending
from msa_train.parallel.comm.cp_groups import KvComm
from msa_train.parallel.kv_exchange.all_gather import AllGatherSession
from msa_train.parallel.kv_exchange.cost_model import KvBlockBytes
from msa_train.parallel.kv_exchange.plan import RankPlan
from msa_train.parallel.kv_exchange.requests import ExchangeDecision, ExchangeTerms, exchange_requests
from msa_train.parallel.kv_exchange.ring import SparseRingSession
from msa_train.parallel.kv_exchange.selected import SelectedSession, SlicedFetch
from msa_train.parallel.kv_exchange.session import ExchangeSession
from msa_train.parallel.sharding.shard_layout import ShardLayout


def negotiate_exchange(
    kind: KvExchange,
    local: Tensor,
    needed: Tensor,
    layout: ShardLayout,
    comm: KvComm,
    settings: ExchangeConfig,
    *,
    k_index: Tensor | None,
    with_backward: bool,
) -> ExchangeDecision:
    """Decide what all ranks do in this layer call; asks the others where that depends on the selection.

    Args:
        kind: `selected` or `auto`; the others bring everything, and nothing is to ask.
        local: [M * NL, 2, B, D] this rank's keys and values by KV block.
        needed: [M, NB] bool, KV blocks that local queries selected.
        layout: this rank's shard.
        comm: collectives of the ranks between which KV blocks travel, of this layer.
        settings: of the exchange.
        k_index: [T, Di] this rank's index keys, checked with the keys and values; None without an index
            branch.
        with_backward: gradients will come back.

    Returns:
        The decision, to be given again where the layer is recomputed.

    Raises:
        ExchangeError: a rank asks for what does not fit, or a collective failed.
    """
    if layout.cp_size == 1:
        return ExchangeDecision(KvExchange.all_gather)
    size = kv_block_bytes(local, k_index, layout, with_backward=with_backward)
    terms = ExchangeTerms(kind, settings, size, (k_index, local))
    return exchange_requests(needed, layout, comm, terms)


def kv_block_bytes(
    local: Tensor, k_index: Tensor | None, layout: ShardLayout, *, with_backward: bool
) -> KvBlockBytes:
    """Count the bytes of a KV block, and of its gradients with those of its index keys."""
    # Gradients of a KV block come back with those of its index keys, once for each KV head.
    forward = local[0].numel() * local.element_size()
    index = 0 if k_index is None else layout.block_size * k_index.shape[-1] * local.element_size()
    backward = forward + index if with_backward else 0
    # as AllGatherSession sends them
    wide = torch.promote_types(local.dtype, torch.float32).itemsize
    return KvBlockBytes(forward, backward, backward * wide // local.element_size())


def open_kv_session(
    decision: ExchangeDecision,
    local: Tensor,
    num_kv_heads: int,
    layout: ShardLayout,
    comm: KvComm,
    settings: ExchangeConfig,
    *,
    index_elements: int = 0,
    fetch: SlicedFetch | None = None,
    gathered: Pending[Tensor] | None = None,
) -> ExchangeSession:
    """Open the exchange of one layer call, as agreed.

    Args:
        decision: of all ranks, now or in an earlier identical call.
        local: [M * NL, 2, B, D] this rank's keys and values by KV block.
        num_kv_heads: M, KV heads.
        layout: this rank's shard.
        comm: collectives of the ranks between which KV blocks travel, of this layer.
        settings: of the exchange.
        index_elements: B * Di where index keys get gradients, else 0.
        fetch: selected KV blocks that are on their way; None: they are still to be fetched.
        gathered: an all-gather that is on its way, likewise.
    """
    if decision.kind is KvExchange.selected:
        plan = decision.plan
        assert isinstance(plan, RankPlan), "an agreed exchange of selected pairs has a plan"
        return SelectedSession(
            local,
            num_kv_heads,
            layout,
            comm,
            plan,
            keep_for_backward=settings.keep_for_backward,
            index_elements=index_elements,
            begun=fetch,
        )
    if decision.kind is KvExchange.all_gather:
        return AllGatherSession(local, num_kv_heads, layout, comm, gathered)
    return SparseRingSession(local, num_kv_heads, layout, comm)
