"""Run collectives of one group of context-parallel ranks: bytes counted, waits measured, failures named.

Every one can be started and waited for later, so that work runs meanwhile; with `overlap=False` starting
waits at once, which changes no result.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Generic, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from msa_train.parallel.comm.fault_watch import FaultWatch
from msa_train.parallel.comm.p2p import start_all_to_all_rows, start_sends_and_receives
from msa_train.parallel.comm.traffic import CommCounters

# torch 2.13 renamed these two and warns about the old names; 2.11 has only the old ones.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_Result = TypeVar("_Result")
# Purpose of a collective, and bytes that it brings.
Point = tuple[str, int]


class Pending(Generic[_Result]):
    """Hold what a started collective will bring.

    It holds the buffers until it has been waited for: on a GPU the collective runs on another stream, and
    memory that was given back earlier could be used for something else while it still reads or writes.
    """

    def __init__(
        self, comm: "CpComm", point: Point, works: list[dist.Work], result: _Result, keep: Any
    ) -> None:
        self.comm, self.point, self.works = comm, point, works
        self._result, self._keep = result, keep

    def wait(self) -> _Result:
        """Block (on a GPU: the current stream only) until the result is here and the own data have left.

        Raises:
            ExchangeError: the collective failed or took longer than allowed.
        """
        if self.works:
            self.comm.wait_for(self.works, self.point)
            self.works = []
        # On a GPU the current stream has waited, so later users of this memory come after the collective.
        self._keep = None
        return self._result


@dataclass
class CpComm:
    """Run the collectives of one rank in one group."""

    group: dist.ProcessGroup | None
    "None: a single rank, nothing is sent"
    rank: int
    "in the group"
    size: int
    "ranks of the group"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    "where the tensors lie"
    counters: CommCounters = field(default_factory=CommCounters)
    "shared by all groups that one step uses"
    overlap: bool = True
    "False: wait where a collective is started"
    layer: int = 0
    "whose calls these are, for messages; 0: no layer's"
    timeout_s: float = 0.0
    "longest wait on a CPU; 0: the group's own"
    watch: FaultWatch | None = None
    "finds out who is missing after a failure"

    def with_new_counters(self) -> Self:
        """Return the same collectives with counters of their own."""
        return self._with(counters=CommCounters())

    def for_layer(self, layer: int) -> Self:
        """Return the same collectives, whose messages name this layer."""
        return self._with(layer=layer)

    def _with(self, **changes: Any) -> Self:
        return replace(self, **changes)

    def all_gather(self, x: Tensor, purpose: str) -> Tensor:
        """Stack x of every rank: [...] -> [size, ...], in rank order.

        Raises:
            ExchangeError: the collective failed or took longer than allowed; so do all below.
        """
        return self.start_all_gather(x, purpose).wait()

    def start_all_gather(self, x: Tensor, purpose: str, out: Tensor | None = None) -> Pending[Tensor]:
        """Begin an all_gather into `out` [size, ...], contiguous; None: into a new tensor."""
        if self.size == 1:
            return self._done(x.unsqueeze(0) if out is None else out.copy_(x.unsqueeze(0)), purpose)
        out = x.new_empty(self.size, *x.shape) if out is None else out
        x = x.contiguous()
        # Counted as received bytes: the own part does not travel.
        num_bytes = (self.size - 1) * x.numel() * x.element_size()
        return self._start(
            lambda: _gather(_rows(out), _line(x), group=self.group, async_op=True), purpose, num_bytes, out, x
        )

    def reduce_scatter(self, x: Tensor, purpose: str) -> Tensor:
        """Sum slice `rank` over ranks: [size, ...] -> [...], in x's dtype."""
        return self.start_reduce_scatter(x, purpose).wait()

    def start_reduce_scatter(self, x: Tensor, purpose: str) -> Pending[Tensor]:
        """Begin a reduce_scatter. On a CPU it is over when this returns."""
        if self.size == 1:
            return self._done(x[0], purpose)
        # gloo would all-reduce everything and drop what other ranks are to have.
        if x.device.type == "cpu":
            return self._done(self._ring_reduce_scatter(x, purpose), purpose)
        out, x = x.new_empty(x.shape[1:]), x.contiguous()
        num_bytes = (self.size - 1) * out.numel() * x.element_size()
        return self._start(
            lambda: _reduce_scatter(_line(out), _rows(x), group=self.group, async_op=True),
            purpose, num_bytes, out, x,
        )  # fmt: skip

    def _ring_reduce_scatter(self, x: Tensor, purpose: str) -> Tensor:
        """Pass partial sums around a ring: P - 1 slices per rank, half of what gloo's all-reduce would move.

        The order of the sum is fixed by the ring, so that runs repeat bit by bit.

        Example: rank r starts with slice r - 1; what it gets is slice r - 2, summed over rank r - 1, and so
        on until its own arrives, which lacks its own part only.
        """
        held = x[(self.rank - 1) % self.size]
        for step in range(2, self.size + 1):
            (arrived,) = self.shift([held], purpose).wait()
            held = arrived.add_(x[(self.rank - step) % self.size])
        return held

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int], purpose: str) -> Tensor:
        """Trade rows: `send[r]` of x to rank r in order -> `receive[r]` from each rank r in order.

        Example: rank 0 of 2, rows [a, b, c], send [1, 2], receive [1, 1] -> [a, first row of rank 1].
        """
        return self.start_all_to_all(x, send, receive, purpose).wait()

    def start_all_to_all(
        self, x: Tensor, send: Sequence[int], receive: Sequence[int], purpose: str, out: Tensor | None = None
    ) -> Pending[Tensor]:
        """Begin an all_to_all into `out` [sum(receive), ...], contiguous; None: into a new tensor."""
        out = x.new_empty(sum(receive), *x.shape[1:]) if out is None else out
        if self.size == 1:
            return self._done(out.copy_(x), purpose)
        x = x.contiguous()
        row_bytes = math.prod(x.shape[1:]) * x.element_size()
        num_bytes = (sum(receive) - receive[self.rank]) * row_bytes
        return self._start(
            lambda: start_all_to_all_rows(self._several, out, x, receive, send), purpose, num_bytes, out, x
        )

    def shift(self, tensors: Sequence[Tensor], purpose: str) -> Pending[list[Tensor]]:
        """Start sending tensors to the next rank of the ring and receiving the previous rank's."""
        incoming = [x.new_empty(x.shape) for x in tensors]
        if self.size == 1:
            return self._done(list(tensors), purpose)
        arriving = [((self.rank - 1) % self.size, x) for x in incoming]
        leaving = [((self.rank + 1) % self.size, x.contiguous()) for x in tensors]
        num_bytes = sum(x.numel() * x.element_size() for x in tensors)
        return self._start(
            lambda: start_sends_and_receives(self._several, arriving, leaving),
            purpose,
            num_bytes,
            incoming,
            leaving,
        )

    @property
    def _several(self) -> dist.ProcessGroup:
        assert self.group is not None, "several ranks have a group"
        return self.group

    def _done(self, result: _Result, purpose: str) -> Pending[_Result]:
        return Pending(self, (purpose, 0), [], result, None)

    def _start(
        self, launch: Callable[[], Any], purpose: str, num_bytes: int, result: _Result, keep: Any
    ) -> Pending[_Result]:
        """Launch, count, and wait at once where nothing is to run meanwhile."""
        point = (purpose, num_bytes)
        self._announce(purpose, num_bytes)
        try:
            works = launch()
        except RuntimeError as error:
            # A group that has lost a rank fails at the launch already.
            raise self._failure(point, error) from error
        self.counters.traffic.add(purpose, num_bytes)
        pending = Pending(self, point, works if isinstance(works, list) else [works], result, keep)
        if not self.overlap:
            pending.wait()
        return pending

    def _announce(self, purpose: str, num_bytes: int) -> None:
        """Note in the watch where this rank is, before a collective is launched."""
        if self.watch is not None:
            self.watch.entered(self.layer, purpose, num_bytes)

    def wait_for(self, works: Sequence[dist.Work], point: Point) -> None:
        """Wait for works, count the time; a failure becomes an ExchangeError."""
        # On a GPU a time limit would make the host wait too; there the group's own limit holds.
        limited = self.timeout_s > 0 and self.device.type == "cpu"
        limit = {"timeout": timedelta(seconds=self.timeout_s)} if limited else {}

        def wait() -> None:
            for work in works:
                work.wait(**limit)

        if self.watch is not None:
            self.watch.waiting(self.layer, *point)
        try:
            self.counters.exposed.run(point[0], self.device, wait)
        except RuntimeError as error:
            raise self._failure(point, error) from error
        if self.watch is not None:
            self.watch.done()

    def to_host(self, x: Tensor, purpose: str) -> list[int]:
        """Copy numbers of a device tensor [n] to the host, without waiting for ever for a broken collective.

        Raises:
            ExchangeError: it took longer than `timeout_s`.
        """
        if x.device.type != "cuda":
            return x.tolist()
        # The host asks the event again and again, for a synchronous copy could not be given up.
        copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        begin_s = time.monotonic()
        while not done.query():
            if 0 < self.timeout_s < time.monotonic() - begin_s:
                raise self._failure((purpose, 0), RuntimeError(f"waited {self.timeout_s:.0f} s"))
            time.sleep(0)
        return copy.tolist()

    def _failure(self, point: Point, error: RuntimeError) -> RuntimeError:
        return error if self.watch is None else self.watch.failure(self.layer, *point, error)


def _rows(x: Tensor) -> Tensor:
    """Join the first two dimensions, as torch wants what is gathered."""
    return x.flatten(0, 1) if x.dim() > 1 else x


def _line(x: Tensor) -> Tensor:
    # A scalar has no dimension along which it could be gathered.
    return x if x.dim() else x.view(1)
