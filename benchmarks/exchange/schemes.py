"""Name what is compared: each scheme is an exchange of msa_train and the collectives it runs on.

All use the collectives of training, but for the nearest rival's scheme: the same session on others.
"""

from dataclasses import dataclass, field, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from msa_train.config import ExchangeConfig, KvExchange
from msa_train.parallel.comm.cp_comm import Pending
from msa_train.parallel.comm.cp_groups import KvComm
from msa_train.parallel.comm.topology import build_comm


class KeepAndAllReduce(KvComm):
    """Turn the all_gather session into what NeMo Automodel does for MiniMax-M3.

    Keys and values are gathered once and kept for the backward pass, where gradients of the whole sequence
    are all-reduced and cut.

    Here and not in msa_train, since nobody should train with it. One layer call per object.
    """

    kept: Tensor | None = None

    def start_all_gather(self, x: Tensor, purpose: str, out: Tensor | None = None) -> Pending[Tensor]:
        """Gather as CpComm does, but hand out what was kept at the second gather of keys and values."""
        if purpose == "kv_again" and self.kept is not None:
            kept, self.kept = self.kept, None
            return self._done(kept, purpose)
        pending = super().start_all_gather(x, purpose, out)
        if purpose == "kv":
            self.kept = pending.wait()
        return pending

    def start_reduce_scatter(self, x: Tensor, purpose: str) -> Pending[Tensor]:
        """Sum over ranks of everything, then slice `rank`."""
        total = x.contiguous()
        dist.all_reduce(total, group=self.group)
        self.counters.traffic.add(purpose, 2 * (self.size - 1) * x[0].numel() * x.element_size())
        return self._done(total[self.rank].clone(), purpose)


@dataclass(slots=True, frozen=True)
class Scheme:
    """Describe a scheme."""

    exchange: KvExchange
    "of msa_train"
    comm: type[KvComm] = KvComm
    "collectives that it runs on"
    settings: ExchangeConfig = field(default_factory=ExchangeConfig)
    "of the exchange"
    by_node: bool = False
    "only for ranks on several nodes, which the exchange then knows of"
    early: bool = False
    "begins before the scoring: an all-gather, or slices of queries"


_SLICED = ExchangeConfig(query_slices=4, hot_share=0.0)
SCHEMES = {
    "all_gather": Scheme(KvExchange.all_gather),
    "all_gather_all_reduce": Scheme(KvExchange.all_gather, KeepAndAllReduce),
    "ring": Scheme(KvExchange.ring),
    "selected": Scheme(KvExchange.selected),
    "selected_no_hot": Scheme(KvExchange.selected, settings=ExchangeConfig(hot_share=0.0)),
    "selected_again": Scheme(KvExchange.selected, settings=ExchangeConfig(keep_for_backward=False)),
    "selected_by_node": Scheme(KvExchange.selected, by_node=True),
    "auto": Scheme(KvExchange.auto),
    "all_gather_early": Scheme(KvExchange.all_gather, early=True),
    "selected_sliced": Scheme(KvExchange.selected, settings=_SLICED, early=True),
    "selected_sliced_by_node": Scheme(KvExchange.selected, settings=_SLICED, early=True, by_node=True),
    "auto_sliced": Scheme(KvExchange.auto, settings=_SLICED, early=True),
}
SCORING_SCHEMES = (
    "all_gather",
    "selected",
    "selected_by_node",
    "selected_sliced",
    "selected_sliced_by_node",
    "auto_sliced",
)
"what is compared with `all_gather_early` where scoring takes its time"
DEFAULT_SCHEMES = ("all_gather", "all_gather_all_reduce", "ring", "selected", "selected_by_node", "auto")
REFERENCE = "all_gather"
"the scheme that the others are compared with"


def settings_of(scheme: Scheme, size: int, num_nodes: int) -> ExchangeConfig:
    """Complete the scheme's settings for `size` ranks; `auto` is told of nodes too."""
    knows_nodes = num_nodes > 1 and (scheme.by_node or scheme.exchange is KvExchange.auto)
    return replace(scheme.settings, ranks_per_node=size // num_nodes if knows_nodes else 0)


def make_comm(scheme: Scheme, num_nodes: int, timeout_s: float) -> KvComm:
    """Build the collectives over all ranks; called by all of them."""
    size, group = dist.get_world_size(), dist.group.WORLD
    assert group is not None, "the job was joined first"
    settings = settings_of(scheme, size, num_nodes)
    comm = build_comm(group, scheme.exchange, settings, torch.device("cpu"), timeout_s).kv
    return scheme.comm(**{item.name: getattr(comm, item.name) for item in fields(KvComm)})
