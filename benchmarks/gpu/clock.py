"""Time calls, on a GPU by its own clock, and watch the time that is left for all of them."""

import statistics
import time
from collections.abc import Callable

import torch

MOST_ROUNDS = 20
ENOUGH_S = 1.0
# A rate of the device is taken over this long: the first milliseconds after a pause run at another clock.
SUSTAINED_S = 0.5
_BATCH_S = 0.05
# Calls before a graph is captured: libraries allocate and choose algorithms in their first ones.
_CALLS_BEFORE_CAPTURE = 3


class Clock:
    """Time calls on one device, up to a moment of the monotonic clock, which all processes share.

    quick: times mean nothing, calls are made as seldom as possible.
    """

    def __init__(self, device: torch.device, deadline: float, *, quick: bool = False) -> None:
        self.device, self.deadline = device, deadline
        self.enough_s, self.sustained_s = (0.0, 0.0) if quick else (ENOUGH_S, SUSTAINED_S)

    @property
    def left_s(self) -> float:
        """Count the seconds until the deadline."""
        return self.deadline - time.monotonic()

    def seconds(self, call: Callable[[], object], *, warm: bool = True) -> float:
        """Return the median of up to MOST_ROUNDS calls that take ENOUGH_S together.

        Args:
            call: what is timed.
            warm: one call before these does not count; False for long calls whose kernels have run before.
        """
        if warm:
            call()
        times = [self._once(call)]
        while sum(times) < self.enough_s and len(times) < MOST_ROUNDS:
            times.append(self._once(call))
        return statistics.median(times)

    def graph_seconds(self, call: Callable[[], object]) -> float:
        """Return the median of replays of a CUDA graph of the call: what it takes without the host's part."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_CALLS_BEFORE_CAPTURE):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return 1.0 / self.rate(graph.replay)

    def rate(self, call: Callable[[], object]) -> float:
        """Return calls per second, sustained: median over batches that take SUSTAINED_S together."""
        call()
        once = max(self._once(call), 1e-6)
        batch = max(1, round(_BATCH_S / once))

        def several() -> None:
            for _ in range(batch):
                call()

        times = [self._once(several)]
        while sum(times) < self.sustained_s:
            times.append(self._once(several))
        return batch / statistics.median(times)

    def _once(self, call: Callable[[], object]) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    def forget_memory(self) -> None:
        """Count `peak_gib` anew from here on."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        """Return the most memory that tensors held since then; None without a GPU."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else None


def matmul_flops(clock: Clock, dtype: torch.dtype, size: int) -> float:
    """Measure FLOP/s of one large square product: what kernels are compared with."""
    a, b = (torch.randn(size, size, device=clock.device).to(dtype) for _ in range(2))
    return 2.0 * size**3 * clock.rate(lambda: a @ b)


def copy_bytes(clock: Clock, num_bytes: int) -> float:
    """Measure bytes/s read and written by a copy."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2.0 * num_bytes * clock.rate(lambda: target.copy_(source))
