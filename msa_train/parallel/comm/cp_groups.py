"""Hold the groups that context-parallel ranks form: all of them, their Ulysses groups, their nodes."""

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Self

from msa_train.parallel.comm.cp_comm import CpComm
from msa_train.parallel.comm.link_rates import ExchangeRates


@dataclass
class KvComm(CpComm):
    """Run collectives of the ranks between which KV blocks travel: those that hold the same KV heads."""

    inner: CpComm | None = None
    "the ranks of this node; None without nodes"
    outer: CpComm | None = None
    "the ranks in this one's place on every node; None without nodes"
    rates: ExchangeRates | None = None
    "measured, for `kv_exchange=auto`"
    compared: set[Hashable] = field(default_factory=set)
    "shapes of exchanges that all ranks have found to be the same; shared by all copies"
    calls: dict[int, Any] = field(default_factory=dict)
    "by layer, what `auto` knows of its last call; shared by all copies"

    def _with(self, **changes: Any) -> Self:
        # Counters and layer are fields of the parts too, so every change goes to all of them.
        nodes = {"inner": self.inner, "outer": self.outer}
        parts = {name: part._with(**changes) for name, part in nodes.items() if part is not None}
        return replace(self, **changes, **parts)


@dataclass(slots=True)
class CpGroups:
    """Hold all collectives of one context-parallel rank.

    Example: 8 ranks with `cp_head_size=2` and nodes of 4: rank 5 is in `whole` with all 8, in `ulysses` with
    rank 4, in `kv` with ranks 1, 3, 7, and there in `inner` with rank 7, in `outer` with rank 1.
    """

    whole: CpComm
    "all ranks that share a sequence"
    kv: KvComm
    "those between which KV blocks travel; the same ranks as `whole` without Ulysses groups"
    ulysses: CpComm | None = None
    "neighbours that trade tokens for KV heads; None where cp_head_size is 1"

    def with_new_counters(self) -> "CpGroups":
        """Return the same groups with counters of their own, which all of them share."""
        kv = self.kv.with_new_counters()
        # Without Ulysses groups both are one object, and stay one.
        whole = kv if self.whole is self.kv else replace(self.whole, counters=kv.counters)
        ulysses = None if self.ulysses is None else replace(self.ulysses, counters=kv.counters)
        return CpGroups(whole, kv, ulysses)
