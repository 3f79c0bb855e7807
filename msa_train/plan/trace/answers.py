"""Answer, in a trace, what the product learns from numbers on the device: sizes of messages.

Each seam is one small function of the product. What is answered here follows from `Assumptions` alone.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from msa_train.checkpoint.torch_dist import shares
from msa_train.checkpoint.torch_dist.format_versions import STATE_PREFIX
from msa_train.model.layers import fusion
from msa_train.model.layers.moe import routing
from msa_train.parallel.kv_exchange import requests
from msa_train.parallel.kv_exchange.plan import ExchangeShape
from msa_train.parallel.process_groups import Groups
from msa_train.plan.trace.assumptions import Assumptions
from msa_train.plan.trace.fake_device import FakeDevice


@contextlib.contextmanager
def answered(assumptions: Assumptions, device: FakeDevice, groups: Groups) -> Iterator[None]:
    """Answer by `assumptions` inside."""
    with contextlib.ExitStack() as stack:
        _answer_exchange(stack, assumptions)
        _answer_experts(stack, assumptions)
        stack.enter_context(patch.object(fusion, "_compiled", _one_kernel(device)))
        stack.enter_context(patch.object(shares.Shares, "learn", _holders_by_groups(groups)))
        yield


def _answer_exchange(stack: contextlib.ExitStack, assumptions: Assumptions) -> None:
    """Answer which KV blocks the ranks want of each other, in one request or in one for each query slice."""
    agree: Any = requests.agree
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


def _one_kernel(device: FakeDevice) -> Any:
    """Stand in for the compiler: a fused function leaves its results in memory and nothing else."""

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            device.counts = False
            try:
                out = function(*args, **kwargs)
            finally:
                device.counts = True
            device.enter(out)
            return out

        return call

    return compiled


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


def _answer_experts(stack: contextlib.ExitStack, assumptions: Assumptions) -> None:
    """Answer how many rows go to which expert."""
    stack.enter_context(
        patch.object(
            routing,
            "counts_on_host",
            lambda _counts, size: routing.assumed_counts(size, assumptions.expert_imbalance),
        )
    )


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
