"""`ring`: shards move around a ring, one at a time; in the backward their gradients travel along."""

from collections.abc import Callable, Iterator

from torch import Tensor

from msa_train.parallel.comm.cp_comm import Pending
from msa_train.parallel.kv_exchange.session import ExchangeSession, KvSource, PairGrads


class SparseRingSession(ExchangeSession):
    """The next shard arrives, and the last one's gradients leave, while this one is computed with."""

    def sources(self) -> Iterator[KvSource]:
        """See ExchangeSession.sources."""
        held = self.local
        for step in range(self.layout.cp_size):
            last = step == self.layout.cp_size - 1
            pending = None if last else self.comm.shift([held], "kv")
            yield self._held_source(held, step)
            if pending is not None:
                (held,) = pending.wait()

    def backward(self, compute: Callable[[KvSource], PairGrads]) -> PairGrads:
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
        owner = (self.layout.cp_rank - step) % self.layout.cp_size
        return self.shard_source(held, range(owner, owner + 1))
