"""Answer, in a trace, what the product learns from numbers on the device: sizes of messages.

Each seam is one small function of the product. What is answered here follows from `Assumptions` alone.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from msa_train.checkpoint.torch_dist import shares
from msa_train.checkpoint.torch_dist.format_versions import STATE_PREFIX
from msa_train.config import KvExchange
from msa_train.model.layers import moe
from msa_train.parallel.kv_exchange import choose, requests
from msa_train.parallel.kv_exchange.plan import ExchangeShape, Hop, RankPlan
from msa_train.parallel.kv_exchange.requests import ExchangeDecision
from msa_train.parallel.process_groups import Groups
from msa_train.parallel.sharding.shard_layout import ShardLayout
from msa_train.plan.trace.assumptions import Assumptions
from msa_train.plan.trace.fake_device import FakeDevice

_MOE: Any = moe


@contextlib.contextmanager
def answered(assumptions: Assumptions, device: FakeDevice, groups: Groups) -> Iterator[None]:
    """Answer by `assumptions` inside."""
    with contextlib.ExitStack() as stack:
        _answer_exchange(stack, assumptions)
        _answer_experts(stack, assumptions, device)
        stack.enter_context(patch.object(shares.Shares, "learn", _holders_by_groups(groups)))
        yield


def _answer_exchange(stack: contextlib.ExitStack, assumptions: Assumptions) -> None:
    """Answer which KV blocks the ranks want of each other, in one request or in one for each query slice."""
    agree: Any = getattr(requests, "agree", None)
    if agree is None:
        stack.enter_context(
            patch.object(
                choose,
                "exchange_requests",
                lambda needed, layout, *_: flat_plan(needed, layout, assumptions.fetched_share),
            )
        )
        return
    slices = [1]
    begin: Any = sys.modules.get("msa_train.parallel.kv_exchange.slices.begin")

    def begin_exchange(*args: Any, num_slices: int, **kwargs: Any) -> Any:
        slices[0] = num_slices
        return begin_of_product(*args, num_slices=num_slices, **kwargs)

    def agreed(received: Tensor, shape: Any, rank: int, comm: Any, *, more: Any = None, **_: Any) -> Any:
        product: Any = requests
        demand = product.find_demand(
            received[:, 8 * product._HEADER :].view(shape.cp_size, shape.cp_size, -1), shape
        )
        counts = stated_rows(shape, rank, assumptions.fetched_share / slices[0])
        asked = [] if more is None else [0] * more(demand).numel()
        return product.Agreement(demand, counts, asked, False)

    if begin is not None:
        begin_of_product = begin.begin_exchange
        _replace_everywhere(stack, begin_of_product, "begin_exchange", begin_exchange)
    _replace_everywhere(stack, agree, "agree", agreed)
    # the ranks' shapes are compared by numbers of the device
    stack.enter_context(patch.object(requests, "_introduce", lambda *_: None))


def _replace_everywhere(stack: contextlib.ExitStack, function: Any, name: str, stand_in: Any) -> None:
    """Replace a function in every module that has imported it by name."""
    for module in list(sys.modules.values()):
        if getattr(module, name, None) is function:
            stack.enter_context(patch.object(module, name, stand_in))


def stated_rows(shape: ExchangeShape, rank: int, share: float) -> list[int]:
    """Count rows as `plan.count_rows` does, where every rank wants `share` of each other's KV blocks.

    Ranks choose on their own, so a node of L wants 1 - (1 - share)^L of them. Nothing is broadcast.

    Example: 4 ranks of 8 KV blocks, share .25, no nodes: to each rank [2, 2, 2, 0], rank 3 being this one.
    """
    each, none = round(share * shape.num_kv_blocks), [0] * shape.cp_size
    if not shape.hierarchical:
        rows = [each] * shape.cp_size
        rows[rank] = 0
        return [*rows, *rows, *none]
    size, nodes = shape.node_size, shape.num_nodes
    crossing = [round((1 - (1 - share) ** size) * shape.num_kv_blocks)] * nodes
    crossing[rank // size] = 0
    handed = [each * nodes] * size
    # what this rank fetched over the network for itself does not leave its own node's place
    handed[rank % size] = each * (nodes - 1)
    return [*crossing, *crossing, *handed, *handed, *none]


def _answer_experts(stack: contextlib.ExitStack, assumptions: Assumptions, device: FakeDevice) -> None:
    """Answer how many rows go to which expert."""
    with contextlib.suppress(ImportError):
        routing: Any = importlib.import_module("msa_train.model.layers.moe.routing")
        stack.enter_context(
            patch.object(
                routing,
                "counts_on_host",
                lambda _counts, size: routing.assumed_counts(size, assumptions.expert_imbalance),
            )
        )
        return

    def preprocess(self: Any, hidden: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        return _dispatch(self, hidden, routing_map, probs, assumptions.expert_imbalance, device)

    stack.enter_context(patch.object(_MOE.AllToAllDispatcher, "dispatch_preprocess", preprocess))


def _holders_by_groups(groups: Groups) -> Any:
    """Say which ranks hold the same shards of a checkpoint, which each rank else tells all others."""
    same_experts = dist.get_process_group_ranks(groups.expert_dp)
    same_weights = dist.get_process_group_ranks(groups.dp_cp)

    def learn(self: Any, found: shares.Shards) -> None:
        for entry in shares._tensors(found):
            # the optimizer's boxes are this rank's own
            ranks = [groups.rank] if entry.key.startswith(STATE_PREFIX) else same_weights
            if ranks is same_weights and ".experts." in entry.key:
                ranks = same_experts
            self._holders[shares.shard_name(entry)] = ranks

    return learn


def flat_plan(needed: Tensor, layout: ShardLayout, share: float) -> ExchangeDecision:
    """Make the plan of a rank that fetches `share` of the remote KV blocks, evenly, and sends as many.

    Example: 4 ranks of 8 KV blocks, share .25: 2 from each of 3 ranks, and 2 to each.
    """
    num_kv_blocks = needed.shape[0] * layout.num_local_blocks
    rows = [round(share * num_kv_blocks)] * layout.cp_size
    rows[layout.cp_rank] = 0
    total, device = sum(rows), needed.device

    def ids(count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64, device=device)

    plan = RankPlan(
        hops=[Hop(ids(total), rows, list(rows))],
        group=ids(total),
        block_of_owner=ids(total),
        owner=ids(total),
        hot_rows=[0] * layout.cp_size,
        hot_pairs=ids(0),
        hot_group=ids(0),
        hot_block_of_owner=ids(0),
        hot_owner=ids(0),
    )
    return ExchangeDecision(KvExchange.selected, plan)


def token_counts(num_tokens: int, topk: int, ranks: int, local: int, imbalance: float) -> Tensor:
    """Count rows to and from each rank and local expert: [2, ranks, local] int64, on the host.

    What leaves is what the tokens make, spread evenly; what arrives is `imbalance` times as much.

    Example: 8 tokens, top-2, 2 ranks of 2 experts, 1.5 -> 4 rows to each expert, 6 from each.
    """
    send = _spread(num_tokens * topk, ranks * local)
    receive = _spread(round(num_tokens * topk * imbalance), ranks * local)
    return torch.tensor([send, receive]).view(2, ranks, local)


def _spread(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


def _dispatch(
    self: Any, hidden: Tensor, routing_map: Tensor, probs: Tensor, imbalance: float, device: FakeDevice
) -> tuple[Tensor, Tensor]:
    self.shape, self.routing_map = hidden.shape, routing_map
    tokens = hidden.view(-1, hidden.shape[-1])
    self.token_shape = tokens.shape
    topk = self.config.model.moe_router_topk
    on_host = token_counts(len(tokens), topk, self.ep_size, self.num_local_experts, imbalance)
    self.received = on_host[1]
    self.send, self.receive = on_host.sum(2).tolist()
    device.selected = sum(self.send)
    permuted = _MOE.permute(tokens, routing_map, probs=probs, num_out_tokens=sum(self.send))
    device.selected = -1
    self.order = permuted[-1] if len(permuted) == 3 else permuted[2]
    assert permuted[1] is not None, "probabilities were given"
    return permuted[0], permuted[1]
