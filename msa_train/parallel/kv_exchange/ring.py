"""Exchange by a `ring`: shards move around it one at a time; in the backward their gradients travel along.

A rank receives P - 1 shards, in the backward pass again, and P sums of gradients: 255 messages of 8 MiB each
way at 256 ranks and 1M tokens (M = 4, D = 128, bf16). No rank holds more than two shards.
"""

from collections.abc import Callable, Iterator

from torch import Tensor

from msa_train.parallel.comm.cp_comm import Pending
from msa_train.parallel.kv_exchange.session import ExchangeSession, KvBlockGrads, KvSource


class SparseRingSession(ExchangeSession):
    """Compute with one shard while the next arrives and the last one's gradients leave."""

    def sources(self) -> Iterator[KvSource]:
        """See ExchangeSession.sources."""
        held = self.local
        for step in range(self.layout.cp_size):
            last = step == self.layout.cp_size - 1
            # The shard leaves before it is computed with, so that the next one arrives meanwhile.
            pending = None if last else self.comm.shift([held], "kv")
            yield self._held_source(held, step)
            if pending is not None:
                (held,) = pending.wait()

    def backward(self, compute: Callable[[KvSource], KvBlockGrads]) -> KvBlockGrads:
        """See ExchangeSession.backward."""
        held, leaving = self.local, None
        for step in range(self.layout.cp_size):
            last = step == self.layout.cp_size - 1
            pending = None if last else self.comm.shift([held], "kv_again")
            grads = [x for x in compute(self._held_source(held, step)) if x is not None]
            # After the last step the sums go to the next rank once more: home to the shard's owner.
            leaving = self._pass_on(grads, leaving)
            if pending is not None:
                (held,) = pending.wait()
        assert leaving is not None, "a ring has at least one rank"
        sums = leaving.wait()
        return sums[0], sums[1] if len(sums) > 1 else None

    def _pass_on(self, grads: list[Tensor], leaving: Pending[list[Tensor]] | None) -> Pending[list[Tensor]]:
        """Add this rank's gradients to the sums that come with the shard, and send them after it."""
        if leaving is not None:
            grads = [a.add_(b) for a, b in zip(leaving.wait(), grads, strict=True)]
        return self.comm.shift(grads, "kv_grad")

    def _held_source(self, held: Tensor, step: int) -> KvSource:
        # Shards move to the next rank: rank 0 of 4 sees shards 0, 3, 2, 1. So gradients of a shard are always
        # added in the order owner, owner + 1, ..., and runs repeat bit by bit.
        owner = (self.layout.cp_rank - step) % self.layout.cp_size
        return self.shard_source(held, range(owner, owner + 1))
