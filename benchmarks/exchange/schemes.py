"""What is compared: a name, the exchange of msa_train behind it, and the collectives it runs on.

The collectives differ in two places from those of training. On gloo torch's reduce_scatter is an all-reduce
that throws most of its result away, so that it moves twice the bytes; here `all_gather` gets a true one, as
on a GPU. And the nearest rival's scheme is the same session on other collectives.
"""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from msa_train.config import KvExchange
from msa_train.parallel.collectives import CpComm


class RingReduceScatter(CpComm):
    """Collectives whose reduce_scatter passes partial sums around a ring: P - 1 slices per rank, no more."""

    def reduce_scatter(self, x: Tensor, purpose: str) -> Tensor:
        """Sum over ranks of slice `rank`: [size, ...] -> [...].

        Example: rank r starts with slice r - 1; what it gets is slice r - 2, summed over rank r - 1, and so
        on until its own arrives, which lacks its own part only.
        """
        held = x[(self.rank - 1) % self.size]
        for step in range(2, self.size + 1):
            (arrived,) = self.shift([held], purpose).wait()
            held = arrived.add_(x[(self.rank - step) % self.size])
        return held


class KeepAndAllReduce(CpComm):
    """Turns the all_gather session into what NeMo Automodel does for MiniMax-M3: keys and values are gathered
    once and kept for the backward pass, where gradients of the whole sequence are all-reduced and cut.

    Here and not in msa_train, since nobody should train with it. One layer call per object.
    """

    kept: Tensor | None = None

    def all_gather(self, x: Tensor, purpose: str) -> Tensor:
        """See CpComm.all_gather; the second gather of keys and values brings what the first one kept."""
        if purpose == "kv_again" and self.kept is not None:
            kept, self.kept = self.kept, None
            return kept
        out = super().all_gather(x, purpose)
        if purpose == "kv":
            self.kept = out
        return out

    def reduce_scatter(self, x: Tensor, purpose: str) -> Tensor:
        """Sum over ranks of everything, then slice `rank`."""
        total = x.contiguous()
        dist.all_reduce(total, group=self.group)
        self.traffic.add(purpose, 2 * (self.size - 1) * x[0].numel() * x.element_size())
        return total[self.rank].clone()


@dataclass(slots=True, frozen=True)
class Scheme:
    """exchange: of msa_train. comm: the collectives. formula: name of its byte formula."""

    exchange: KvExchange
    comm: type[CpComm]
    formula: str


SCHEMES = {
    "all_gather": Scheme(KvExchange.all_gather, RingReduceScatter, "all_gather"),
    "all_gather_all_reduce": Scheme(KvExchange.all_gather, KeepAndAllReduce, "all_gather_all_reduce"),
    "ring": Scheme(KvExchange.ring, CpComm, "ring"),
    "selected": Scheme(KvExchange.selected, CpComm, "selected"),
}
REFERENCE = "all_gather"
"the scheme that the others are compared with"


def make_comm(scheme: Scheme, num_nodes: int) -> CpComm:
    """Collectives of all ranks with counters of their own."""
    return scheme.comm(group=dist.group.WORLD, rank=dist.get_rank(), size=dist.get_world_size())
