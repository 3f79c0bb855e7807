"""Run one rank of the benchmark: a process that makes steps as it is told, and reports on them."""

import ctypes
import os
import signal
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.exchange import namespaces
from benchmarks.exchange.counters import read_counters, read_retransmits
from benchmarks.exchange.formulas import LayerShape
from benchmarks.exchange.layer import LayerData, layer_step, make_layer, worst_row_error
from benchmarks.exchange.schemes import SCHEMES, make_comm
from benchmarks.exchange.selections import remote_kv_blocks
from benchmarks.exchange.source_times import timed_sources
from benchmarks.machine import status_bytes
from msa_train.config import KvExchange
from msa_train.parallel.comm.cp_groups import KvComm
from msa_train.parallel.comm.topology import measure_rates

_MMAP_THRESHOLD = -3
_PORT = 29500


@dataclass(slots=True)
class RankPlace:
    """Locate a rank."""

    rank: int
    "from 0"
    size: int
    "ranks of the part"
    num_nodes: int
    "1 or 2"
    shaped: bool
    "in a namespace of its own, else over loopback"
    folder: str
    "holds the file at which unshaped ranks meet"
    timeout_s: float
    "of any collective, in seconds"


@dataclass(slots=True)
class StepReport:
    """Report one step of one rank; times are in seconds."""

    wall_s: float
    "from a barrier to this rank's end"
    compute_s: float
    "CPU time of the thread that computes"
    process_cpu_s: float
    "CPU time of all threads, those of gloo too"
    sources_s: dict[str, float]
    "CPU time over own and over other blocks, see `timed_sources`"
    counters: tuple[int, int, int, int]
    "bytes and packets received, bytes and packets sent, of the interface"
    traffic: dict[str, int]
    "bytes that arrived from other ranks as counted by the collectives, by purpose"
    retransmits: int
    "TCP segments that this rank sent again"
    exposed_s: dict[str, float]
    "time spent waiting for collectives, by purpose"
    used: KvExchange
    "exchange that was taken"
    by_node: bool
    "it crossed the network once per node"
    error: float | None = None
    "worst row against the reference scheme, if asked for"


@dataclass(slots=True)
class RankWorker:
    """Answer requests; every rank gets the same ones in the same order."""

    place: RankPlace
    "of this rank"
    interface: str
    "whose bytes are counted"
    layers: dict[str, LayerData] = field(default_factory=dict)
    "data by selection"
    reference: dict[str, Tensor] = field(default_factory=dict)
    "output and gradients of the first checked step of the selection that was prepared last"
    comms: dict[str, KvComm] = field(default_factory=dict)
    "collectives by scheme"
    scoring_s: float = 0.0
    "time that passes in the place of scoring blocks"

    def connect(self, schemes: list[str]) -> None:
        """Build the collectives of all schemes."""
        for name in schemes:
            self.comms[name] = make_comm(SCHEMES[name], self.place.num_nodes, self.place.timeout_s)

    def prepare(self, selection: str, shape: LayerShape) -> np.ndarray:
        """Build a layer's data; returns the pairs that this rank wants, [P, NP] bool by owner."""
        data = make_layer(selection, shape, self.place.rank, self.place.size)
        self.layers[selection], self.reference = data, {}
        return remote_kv_blocks(data.block_indices, data.layout).flatten(1).numpy()

    def limit_link(self, rates: namespaces.Rates) -> None:
        """Limit what this rank sends."""
        namespaces.limit_rank(rates)

    def score(self, scoring_s: float) -> None:
        """Let so much time pass in the place of scoring from now on."""
        self.scoring_s = scoring_s

    def calibrate(self) -> dict[str, dict[str, Any]]:
        """Measure the rates that `auto` decides by; returns them by scheme."""
        for comm in self.comms.values():
            if comm.rates is not None:
                comm.rates = measure_rates(comm)
        return {name: asdict(comm.rates) for name, comm in self.comms.items() if comm.rates is not None}

    def step(self, selection: str, scheme: str, check: bool) -> StepReport:
        """Make one step.

        Args:
            selection: that was prepared.
            scheme: that was connected.
            check: compare with the first checked step's numbers, which are the reference.
        """
        data, comm = self.layers[selection], self.comms[scheme].with_new_counters()
        dist.barrier()
        counters, retransmits = read_counters(self.interface), read_retransmits()
        wall, compute, cpu = time.perf_counter(), time.thread_time(), time.process_time()
        with timed_sources(data.layout) as sources:
            result = layer_step(data, SCHEMES[scheme], comm, self.scoring_s)
        wall, compute = time.perf_counter() - wall, time.thread_time() - compute
        cpu = time.process_time() - cpu
        # only now has all arrived that this step sends; the barriers' own bytes are counted with it
        dist.barrier()
        moved = read_counters(self.interface) - counters
        report = StepReport(
            wall_s=wall,
            compute_s=compute,
            process_cpu_s=cpu,
            sources_s=sources,
            counters=(moved.received_bytes, moved.received_packets, moved.sent_bytes, moved.sent_packets),
            traffic=_of_step(comm.counters.traffic.received),
            retransmits=read_retransmits() - retransmits,
            exposed_s=dict(comm.counters.exposed.seconds()),
            used=result.used,
            by_node=result.by_node,
        )
        if check:
            if not self.reference:
                self.reference = result.tensors
            report.error = worst_row_error(result.tensors, self.reference)
        return report

    def memory(self, selection: str, scheme: str) -> int:
        """Measure the peak bytes of one step above what was resident before, after a step that warms up."""
        data = self.layers[selection]
        self.reference, peak = {}, 0
        for _ in range(2):
            comm = self.comms[scheme].with_new_counters()
            dist.barrier()
            before = _reset_peak()
            layer_step(data, SCHEMES[scheme], comm)
            peak = status_bytes("VmHWM") - before
        return peak


def run_rank(place: RankPlace, pipe: Connection) -> None:
    """Run a rank's process: join the others, answer requests until None or the end of the pipe."""
    namespaces.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    try:
        worker = RankWorker(place, _join(place, pipe))
        pipe.send(None)
        while (request := pipe.recv()) is not None:
            name, arguments = request
            pipe.send(getattr(worker, name)(*arguments))
    except EOFError:
        pass
    except BaseException:
        pipe.send(RankFailure(traceback.format_exc()))
    # A normal exit would wait for peers in the destructors of process groups.
    os._exit(0)


@dataclass(slots=True)
class RankFailure:
    """Stand in place of an answer where a rank raised."""

    text: str
    "its traceback"


def _join(place: RankPlace, pipe: Connection) -> str:
    """Enter the namespace, wait for the links, meet the others; returns the interface."""
    interface = "lo"
    if place.shaped:
        namespaces.enter_rank_network()
        pipe.send(os.getpid())
        pipe.recv()
        namespaces.set_up_rank(place.rank)
        interface = namespaces.INTERFACE
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    store = f"tcp://{namespaces.address(0)}:{_PORT}" if place.shaped else f"file://{place.folder}/store"
    dist.init_process_group(
        "gloo",
        init_method=store,
        rank=place.rank,
        world_size=place.size,
        timeout=timedelta(seconds=place.timeout_s),
    )
    return interface


def _of_step(received: Mapping[str, int]) -> dict[str, int]:
    """Leave out what ranks tell each other once for each shape of an exchange: that `auto` took another one
    for the first time is not this step's."""
    return {purpose: count for purpose, count in received.items() if purpose != "request_shape"}


def _reset_peak() -> int:
    """Give freed memory back, start the peak anew; returns resident bytes."""
    libc = ctypes.CDLL(None)
    # Large buffers get pages of their own and give them back, so that the peak is that of live buffers.
    libc.mallopt(_MMAP_THRESHOLD, 65536)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")
