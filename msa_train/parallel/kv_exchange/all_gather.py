"""Exchange by `all_gather`: all ranks get all keys and values; gradients are reduce-scattered.

A rank receives 2 * M * D numbers for every token of the others, in the backward pass again: 2 GiB each
time at 1M tokens on 256 ranks (M = 4, D = 128, bf16). Gradients are added on the way, so in fp32: 4 GiB. The
number of ranks changes nothing.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from msa_train.parallel.comm.cp_comm import Pending
from msa_train.parallel.comm.cp_groups import KvComm
from msa_train.parallel.kv_exchange.session import ExchangeSession, KvBlockGrads, KvSource
from msa_train.parallel.sharding.shard_layout import ShardLayout


class AllGatherSession(ExchangeSession):
    """Gather all KV blocks under the attention over own ones, or from before the scoring on."""

    def __init__(
        self,
        local: Tensor,
        num_kv_heads: int,
        layout: ShardLayout,
        comm: KvComm,
        begun: Pending[Tensor] | None = None,
    ) -> None:
        """Take over `local`; begun: the gather of the first pass, if it is on its way."""
        super().__init__(local, num_kv_heads, layout, comm)
        self._begun = begun

    def sources(self) -> Iterator[KvSource]:
        """See ExchangeSession.sources."""
        pending = self._begun or self.comm.start_all_gather(self.local, "kv")
        self._begun = None
        yield self.own_source()
        if self.layout.cp_size > 1:
            yield self._others(pending.wait())

    def backward(self, compute: Callable[[KvSource], KvBlockGrads]) -> KvBlockGrads:
        """See ExchangeSession.backward."""
        # All shards would be P times the memory of a layer if they were kept, so they are gathered again.
        pending = self.comm.start_all_gather(self.local, "kv_again")
        own = compute(self.own_source())
        if self.layout.cp_size == 1:
            return own
        others = compute(self._others(pending.wait()))
        del pending
        # Summed over the ranks between which KV blocks travel; the owner adds its own share afterwards.
        parts = [(a, b) for a, b in zip(own, others, strict=True) if a is not None and b is not None]
        returning = [self.comm.start_reduce_scatter(self._shards(b), "kv_grad") for _, b in parts]
        sums = [a.add_(sent.wait().to(a.dtype)) for (a, _), sent in zip(parts, returning, strict=True)]
        return sums[0], sums[1] if len(sums) > 1 else None

    def _others(self, gathered: Tensor) -> KvSource:
        """Make a source of all shards [P, M * NL, 2, B, D]; own blocks are left to the other source."""
        source = self.shard_source(gathered.flatten(0, 1), range(self.layout.cp_size))
        source.physical_block.masked_fill_(self.own_source().physical_block >= 0, -1)
        return source

    def _shards(self, grad: Tensor) -> Tensor:
        # in fp32 at least: the reduce-scatter adds, and in 16 bits would round at every rank
        wide = torch.promote_types(self.local.dtype, torch.float32)
        return grad.view(self.layout.cp_size, -1, *grad.shape[1:]).to(wide)
