"""Stand in for the deep_ep package under Megatron's binding of it: the same calls, rows traded over gloo.

Megatron's `fused_a2a` runs as it is. What goes in and out is that of `deep_ep.Buffer`: a token leaves once
for each rank; what arrives lies by rank, then in the order of tokens, with its experts numbered among those
of the rank, -1 for others, and their probabilities, 0 for others.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe import fused_a2a
from torch import Tensor

RANKS = (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)


class Buffer:
    """Trade rows as DeepEP's buffer does."""

    num_sms = 20
    num_nvl_bytes = num_rdma_bytes = 0

    def __init__(self, group: Any, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        assert (num_nvl_bytes, num_rdma_bytes) == (0, 0)
        self.group = group

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Any:
        assert num_ranks in RANKS
        return SimpleNamespace(
            get_nvl_buffer_size_hint=lambda _bytes, _ranks: 0,
            get_rdma_buffer_size_hint=lambda _bytes, _ranks: 0,
        )

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int, **_options: Any) -> tuple[Any, ...]:
        assert topk_idx.dtype == torch.int64
        assert topk_idx.is_contiguous()
        assert int(topk_idx.min()) >= -1
        assert int(topk_idx.max()) < num_experts
        num_ranks = self.group.size()
        owner = topk_idx.div(num_experts // num_ranks, rounding_mode="floor")
        is_token_in_rank = torch.stack([(owner == rank).any(1) for rank in range(num_ranks)], dim=1)
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).int()
        return is_token_in_rank.sum(0).int(), None, per_expert, is_token_in_rank, None

    def dispatch(
        self,
        x: Tensor,
        handle: Any = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_tokens_per_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        **_options: Any,
    ) -> tuple[Any, ...]:
        assert x.is_contiguous()
        assert x.shape[1] * x.element_size() % 16 == 0
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            tokens, send, receive, num_tokens = handle
            assert len(x) == num_tokens
            return self._trade(x[tokens], send, receive), None, None, None, None, None
        assert topk_idx is not None
        assert topk_weights is not None
        assert num_tokens_per_rank is not None
        assert num_tokens_per_expert is not None
        assert is_token_in_rank is not None
        assert topk_weights.dtype == torch.float32
        assert topk_weights.is_contiguous()
        # rank by rank, tokens in their order
        tokens = is_token_in_rank.t().nonzero()[:, 1]
        send = num_tokens_per_rank.tolist()
        arriving = torch.empty(len(send), dtype=torch.int64)
        dist.all_to_all_single(arriving, torch.tensor(send), group=self.group)
        receive = arriving.tolist()
        first = self.group.rank() * (num_local := len(num_tokens_per_expert) // len(send))
        experts = self._trade(topk_idx[tokens], send, receive) - first
        is_here = (experts >= 0) & (experts < num_local)
        scales = self._trade(topk_weights[tokens], send, receive) * is_here
        experts = experts.where(is_here, -1)
        counts = torch.bincount(experts[is_here], minlength=num_local).tolist()
        handle = (tokens, send, receive, len(x))
        return self._trade(x[tokens], send, receive), experts, scales, counts, handle, None

    def combine(
        self, x: Tensor, handle: Any, topk_weights: Tensor | None = None, **_options: Any
    ) -> tuple[Tensor, Tensor | None, None]:
        assert x.is_contiguous()
        tokens, send, receive, num_tokens = handle
        assert len(x) == sum(receive)

        def add_up(rows: Tensor) -> Tensor:
            out = torch.zeros(num_tokens, rows.shape[1])
            return out.index_add_(0, tokens, self._trade(rows, receive, send).float()).to(rows.dtype)

        return add_up(x), None if topk_weights is None else add_up(topk_weights), None

    def _trade(self, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        # bf16 is exact in fp32, which gloo knows
        wide = rows.float() if rows.is_floating_point() else rows
        out = wide.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(out, wide.contiguous(), receive, send, group=self.group)
        return out.to(rows.dtype)


@contextmanager
def installed() -> Iterator[None]:
    """Let Megatron's binding find the package."""
    package, utils = ModuleType("deep_ep"), ModuleType("deep_ep.utils")
    package.Buffer, package.utils = Buffer, utils  # type: ignore[attr-defined]
    utils.EventHandle = utils.EventOverlap = object  # type: ignore[attr-defined]
    sys.modules |= {"deep_ep": package, "deep_ep.utils": utils}
    try:
        importlib.reload(fused_a2a)
        yield
    finally:
        del sys.modules["deep_ep"], sys.modules["deep_ep.utils"]
        importlib.reload(fused_a2a)
