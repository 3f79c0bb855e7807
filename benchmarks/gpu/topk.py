"""Time selection against scores in memory and `torch.topk`, of all queries and of few."""

from benchmarks.gpu.context import Context, Step
from benchmarks.gpu.problem import make_index, select
from benchmarks.gpu.rows import Row
from benchmarks.gpu.selection_reference import torch_topk

ALL, FEW = "selection against torch.topk", "selection of {:,} queries against torch.topk"


class TopkPart:
    """Time both at one length; scoring is part of either side's time."""

    def __init__(self, context: Context) -> None:
        self.context, self.seq_len = context, context.scale.topk_seq_len

    def steps(self) -> dict[str, Step]:
        """Return the case of few queries first, which the paper has (arXiv 2606.13392, table 1)."""
        few = self.context.scale.topk_queries
        return {
            FEW.format(few): Step(
                lambda: self._measure(FEW.format(few), few), ("selection", "selection, ranges divided")
            ),
            ALL: Step(lambda: self._measure(ALL, None), ("selection",)),
        }

    def _measure(self, what: str, num_queries: int | None) -> None:
        context, sizes = self.context, self.context.sizes
        index = make_index(context.tensors, sizes, self.seq_len)
        ours_s = context.clock.seconds(lambda: select(index, sizes, context.kernel, num_queries))
        theirs_s = context.clock.seconds(lambda: torch_topk(index, sizes, num_queries))
        flops = sizes.scoring_flops(self.seq_len, num_queries)
        context.add(Row(what, self.seq_len, ours_s, flops=flops, rival_s=theirs_s, rival="torch.topk"))
