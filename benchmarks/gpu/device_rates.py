"""Measure the device's own rates, before everything and after it: what shares are shares of."""

from benchmarks.gpu.clock import copy_bytes, matmul_flops
from benchmarks.gpu.context import Context, Step

BEFORE, AFTER = "before", "after"


class RatesPart:
    """Measure a large matrix product and a large copy, each sustained."""

    def __init__(self, context: Context, when: str) -> None:
        self.context, self.when = context, when

    def steps(self) -> dict[str, Step]:
        """Return one step: half a rate is of no use."""
        return {"rates": Step(self._measure)}

    def _measure(self) -> None:
        context, scale = self.context, self.context.scale
        flops = matmul_flops(context.clock, scale.dtype, scale.matmul_size)
        num_bytes = copy_bytes(context.clock, scale.copy_bytes)
        context.records.append("rates", when=self.when, matmul_flops=flops, copy_bytes=num_bytes)
