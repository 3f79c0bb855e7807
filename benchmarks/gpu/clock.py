"""Seconds of calls, on a GPU by its own clock, and the time that the whole benchmark may take."""

import statistics
import time
from collections.abc import Callable

import torch

MOST_ROUNDS = 20
ENOUGH_S = 1.0


class Clock:
    """Times calls on one device, and knows how much time is left for all of them."""

    def __init__(self, device: torch.device, budget_s: float) -> None:
        self.device, self.budget_s, self.start = device, budget_s, time.monotonic()

    @property
    def left_s(self) -> float:
        """Of the budget."""
        return self.budget_s - (time.monotonic() - self.start)

    def seconds(self, call: Callable[[], object], *, warm: bool = True) -> float:
        """Median of up to MOST_ROUNDS calls that take ENOUGH_S together; the first call does not count.

        warm False: the first call counts too, for long calls whose kernels have run before.
        """
        if warm:
            call()
        times = [self._once(call)]
        while sum(times) < ENOUGH_S and len(times) < MOST_ROUNDS:
            times.append(self._once(call))
        return statistics.median(times)

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
        """From here on `peak_gib` counts anew."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        """Most memory that tensors held since then; None without a GPU."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else None


def matmul_flops(clock: Clock, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of one large square product: what kernels are compared with."""
    a, b = (torch.randn(size, size, device=clock.device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / clock.seconds(lambda: a @ b)


def copy_bytes(clock: Clock, num_bytes: int) -> float:
    """Bytes/s read and written by a copy."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    return 2.0 * num_bytes / clock.seconds(lambda: target.copy_(source))
