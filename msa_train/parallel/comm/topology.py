"""Build the collectives of the exchange: nodes of context-parallel ranks, measured rates, the watch.

All ranks of the job create all groups: 256 context-parallel ranks on nodes of 8 make 32 groups inside nodes
and 8 between them.
"""

import os
import time
from collections.abc import Callable
from dataclasses import fields
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from msa_train.config import ExchangeConfig, KvExchange
from msa_train.parallel.comm.cp_comm import CpComm
from msa_train.parallel.comm.cp_groups import CpGroups, KvComm
from msa_train.parallel.comm.fault_watch import FaultWatch
from msa_train.parallel.comm.link_rates import ExchangeRates, Line, fit_line
from msa_train.parallel.comm.traffic import CommCounters

# Bytes that the busiest rank moves in the measured collectives, and how often each is repeated.
_MEASURED_BYTES = (4096, 4 * 2**20)
_ROUNDS = 5


def build_comm(
    group: dist.ProcessGroup,
    kind: KvExchange,
    exchange: ExchangeConfig,
    device: torch.device,
    timeout_s: float,
    head_size: int = 1,
    watch: FaultWatch | None = None,
) -> CpGroups:
    """Build the collectives of this rank; all ranks of the job call it together.

    Args:
        group: context-parallel ranks.
        kind: `auto` measures the rates that it decides by.
        exchange: nodes, overlap.
        device: of the tensors.
        timeout_s: longest wait, in seconds.
        head_size: ranks of a Ulysses group; with more than one, nodes and rates are those of the ranks that
            hold the same KV heads.
        watch: of the job; None: one of this group is started.

    Raises:
        ValueError: nodes that were detected do not divide the group.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    rest: dict[str, Any] = {
        "device": device,
        "counters": CommCounters(),
        "overlap": exchange.overlap,
        "timeout_s": timeout_s,
        "watch": watch or _watch(group),
    }
    if head_size == 1:
        kv = KvComm(group, rank, size, **rest)
        _add_nodes(kv, kind, exchange, head_size)
        return CpGroups(kv, kv)
    # Neighbours trade tokens, most often inside a node; ranks head_size apart hold the same KV heads.
    ulysses, sequence = _split(group, head_size, timeout_s)
    kv = KvComm(sequence, rank // head_size, size // head_size, **rest)
    _add_nodes(kv, kind, exchange, head_size)
    return CpGroups(
        whole=CpComm(group, rank, size, **rest),
        kv=kv,
        ulysses=CpComm(ulysses, rank % head_size, head_size, **rest),
    )


def _add_nodes(comm: KvComm, kind: KvExchange, exchange: ExchangeConfig, head_size: int) -> None:
    """Give the collectives over which blocks travel their nodes, and rates where these decide."""
    assert comm.group is not None, "built from a group"
    node_size = find_node_size(exchange, comm.group, head_size)
    if kind in (KvExchange.selected, KvExchange.auto) and 1 < node_size < comm.size:
        inner, outer = _split(comm.group, node_size, comm.timeout_s)
        comm.inner = _part(comm, inner, comm.rank % node_size, node_size)
        comm.outer = _part(comm, outer, comm.rank // node_size, comm.size // node_size)
    if kind is KvExchange.auto and comm.size > 1:
        comm.rates = measure_rates(comm)


def _part(comm: KvComm, group: dist.ProcessGroup, rank: int, size: int) -> CpComm:
    """Return collectives of some of the ranks, with everything else as in `comm`."""
    # Parts are plain collectives: a node has no nodes of its own.
    kept = {item.name: getattr(comm, item.name) for item in fields(CpComm)}
    return CpComm(**kept | {"group": group, "rank": rank, "size": size})


def find_node_size(exchange: ExchangeConfig, group: dist.ProcessGroup, head_size: int = 1) -> int:
    """Count the ranks of the group on a node: as configured or, with -1, as LOCAL_WORLD_SIZE says.

    `exchange.ranks_per_node` counts context-parallel ranks, of which the group has one in head_size.

    Example: 16 ranks of a group on every second rank of machines with 8 -> 4.

    Raises:
        ValueError: machines hold unequal numbers of the group's ranks.
    """
    if exchange.ranks_per_node >= 0:
        return exchange.ranks_per_node // head_size
    ranks, local = dist.get_process_group_ranks(group), int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if local == 0:
        return 0
    # torchrun and Slurm number the ranks of a machine one after the other.
    per_node = [sum(rank // local == node for rank in ranks) for node in sorted({r // local for r in ranks})]
    if len(set(per_node)) > 1:
        raise ValueError(
            f"exchange.ranks_per_node=-1: machines with {local} processes hold {per_node} ranks of one "
            "sequence; use exchange.ranks_per_node=0 or another parallel.cp_size"
        )
    return per_node[0]


def _watch(group: dist.ProcessGroup) -> FaultWatch | None:
    ranks = dist.get_process_group_ranks(group)
    if len(ranks) == 1:
        return None
    watch = FaultWatch(_get_default_store(), ranks, dist.get_rank(group))
    watch.start()
    return watch


def _split(
    group: dist.ProcessGroup, size: int, timeout_s: float
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Create the group of this rank's `size` neighbours, and that of the ranks in its place of all runs.

    torch wants every rank of the job to create every group, in the same order.

    Example: ranks 0 to 7, size 4, rank 5 -> (4, 5, 6, 7) and (1, 5).
    """
    # Other sequences have nodes too, and every rank must create the groups of all in one order.
    everyone: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, dist.get_process_group_ranks(group))
    found: dict[str, dist.ProcessGroup] = {}
    for ranks in sorted({tuple(ranks) for ranks in everyone}):
        nodes = [list(ranks[i : i + size]) for i in range(0, len(ranks), size)]
        rails = [list(ranks[place::size]) for place in range(size)]
        for name, members in [*(("inner", n) for n in nodes), *(("outer", r) for r in rails)]:
            created = dist.new_group(members, timeout=timedelta(seconds=timeout_s))
            if dist.get_rank() in members:
                assert isinstance(created, dist.ProcessGroup), "a member is given the group"
                found[name] = created
    return found["inner"], found["outer"]


def measure_rates(comm: KvComm) -> ExchangeRates:
    """Measure latency and rate of the collectives that `auto` chooses between; the same on all ranks.

    Each is run at two sizes; the fastest of a few rounds counts, of the slowest rank. Takes well under a
    second on a network of 1 Gbit/s and more.
    """
    timed = comm.with_new_counters()
    # All groups of a kind are measured at once, as they run in a step: links that they share are shared here.
    hops = [
        Line(0.0, 0.0) if part is None else _line(timed, part, _all_to_all)
        for part in (timed.inner, timed.outer)
    ]
    flat = [_line(timed, timed, run) for run in (_all_to_all, _all_gather, _reduce_scatter)]
    return ExchangeRates(*flat, *hops)


def _line(everyone: CpComm, comm: CpComm, run: Callable[[CpComm, int], None]) -> Line:
    """Time `run` on the ranks of `comm`; the slowest rank of all counts."""
    seconds = []
    for num_bytes in _MEASURED_BYTES:
        rounds = []
        for _ in range(_ROUNDS + 1):
            _synchronize(comm.device)
            begin = time.perf_counter()
            run(comm, num_bytes)
            _synchronize(comm.device)
            rounds.append(time.perf_counter() - begin)
        # The first round also sets up connections.
        fastest = torch.tensor([min(rounds[1:])], dtype=torch.float64, device=comm.device)
        seconds.append(float(everyone.all_gather(fastest, "calibration").max()))
    return fit_line(_MEASURED_BYTES, seconds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bytes(comm: CpComm, rows: int, num_bytes: int) -> Tensor:
    """Make zeros [rows, n] fp32 of which size - 1 rows make up `num_bytes`."""
    n = max(1, num_bytes // (4 * max(comm.size - 1, 1)))
    return torch.zeros(rows, n, device=comm.device)


def _all_to_all(comm: CpComm, num_bytes: int) -> None:
    # Even messages: what counts in an exchange is the bytes of the busiest rank.
    ones = [1] * comm.size
    comm.all_to_all(_bytes(comm, comm.size, num_bytes), ones, ones, "calibration")


def _all_gather(comm: CpComm, num_bytes: int) -> None:
    comm.all_gather(_bytes(comm, 1, num_bytes)[0], "calibration")


def _reduce_scatter(comm: CpComm, num_bytes: int) -> None:
    comm.reduce_scatter(_bytes(comm, comm.size, num_bytes), "calibration")
