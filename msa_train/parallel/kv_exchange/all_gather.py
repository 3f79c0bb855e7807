"""`all_gather`: all ranks get all keys and values, in the backward again; gradients are reduce-scattered."""

from collections.abc import Callable, Iterator

from torch import Tensor

from msa_train.parallel.kv_exchange.session import ExchangeSession, KvSource, PairGrads


class AllGatherSession(ExchangeSession):
    """The gather runs under the attention over own pairs."""

    def sources(self) -> Iterator[KvSource]:
        """See ExchangeSession.sources."""
        pending = self.comm.start_all_gather(self.local, "kv")
        yield self.own_source()
        if self.layout.cp_size > 1:
            yield self._others(pending.wait())

    def backward(self, compute: Callable[[KvSource], PairGrads]) -> PairGrads:
        """See ExchangeSession.backward."""
        pending = self.comm.start_all_gather(self.local, "kv_again")
        own = compute(self.own_source())
        if self.layout.cp_size == 1:
            return own
        others = compute(self._others(pending.wait()))
        del pending
        parts = [(a, b) for a, b in zip(own, others, strict=True) if a is not None and b is not None]
        returning = [self.comm.start_reduce_scatter(self._shards(b), "kv_grad") for _, b in parts]
        sums = [a.add_(sent.wait().to(a.dtype)) for (a, _), sent in zip(parts, returning, strict=True)]
        return sums[0], sums[1] if len(sums) > 1 else None

    def _others(self, gathered: Tensor) -> KvSource:
        """All shards; own blocks are left to the other source. gathered: [P, M * NL, 2, B, D]."""
        source = self.shard_source(gathered.flatten(0, 1), range(self.layout.cp_size))
        source.physical_block.masked_fill_(self.own_source().physical_block >= 0, -1)
        return source

    def _shards(self, grad: Tensor) -> Tensor:
        return grad.view(self.layout.cp_size, -1, *grad.shape[1:]).to(self.local.dtype)
