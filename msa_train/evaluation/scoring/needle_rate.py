"""Count how often MSA layers select the blocks that hold a needle, by layer and KV head.

It separates "not selected" from "selected and not used". A query counts where it predicts a token of the
answer that a needle is needed for; it is a success where a block that the needle touches is among the query's
top-k. One is enough: a needle of 45 bytes lies in 6 blocks of 8, and a query that copies one letter wants one
of them; a needle of 20 tokens lies in one block of 128, rarely two. Blocks nearby are selected always, so
needles close to the answer are no evidence.

On the device a layer adds rows x needles x topk comparisons for each KV head: 30 answer tokens, 1 needle, 16
blocks. Over ranks it is one all-reduce of 2 x layers x KV heads numbers: 60 x 4 x 2 x 8 bytes are 4 KB.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from msa_train.config import RunConfig, StageAttention
from msa_train.data import Pack
from msa_train.evaluation.scoring.engine import EvaluatedEngine, is_surplus
from msa_train.evaluation.scoring.packs import PackedDocuments
from msa_train.evaluation.tasks.sample import Sample
from msa_train.model.inputs.pack_params import OnSelection
from msa_train.parallel.comm.fault_watch import watched
from msa_train.parallel.process_groups import Groups
from msa_train.parallel.sharding.shard_layout import ShardLayout


class NeedleRate:
    """Count selections of the needles of some samples."""

    def __init__(self, config: RunConfig, groups: Groups, samples: Sequence[Sample]) -> None:
        self.samples, self.groups = samples, groups
        shape = (2, config.model.num_layers, config.model.num_kv_heads)
        self._counts = torch.zeros(shape, dtype=torch.float64, device=groups.device)
        "[2, layers, KV heads]: successes, and queries times needles"
        self._waiting: dict[int, PackedDocuments] = {}

    @staticmethod
    def is_measured(engine: EvaluatedEngine) -> bool:
        """Tell whether layers select here; Ulysses groups trade queries for heads, which is not followed."""
        sparse = engine.stage.attention is StageAttention.sparse
        return sparse and engine.config.parallel.cp_head_size == 1

    def watch(self, engine: EvaluatedEngine, packed: Sequence[PackedDocuments], count: int) -> None:
        """Listen to the layers while these packs run; `count` is the number over all data-parallel ranks."""
        self._waiting = {
            id(one.pack): one for turn, one in enumerate(packed) if not is_surplus(turn, count, self.groups)
        }
        engine.forward.open_selections = self._open

    def leave(self, engine: EvaluatedEngine) -> None:
        """Listen no more."""
        engine.forward.open_selections = None
        self._waiting = {}

    def _open(self, pack: Pack, layout: ShardLayout) -> OnSelection | None:
        """Find the queries and needles of a pack on this rank."""
        # once: an interleaved pipeline may run the last pack again
        packed = self._waiting.pop(id(pack), None)
        wanted = [] if packed is None else _queries(packed, self.samples, layout)
        if not wanted:
            return None

        def add(layer: int, block_indices: Tensor) -> None:
            first = self.groups.tp_rank * block_indices.shape[1]
            for rows, blocks in wanted:
                chosen = block_indices[torch.from_numpy(rows).to(block_indices.device)]
                needed = torch.from_numpy(blocks).to(chosen.device, chosen.dtype)
                found = (chosen[:, :, :, None] == needed).flatten(2).any(2).sum(0)
                heads = slice(first, first + len(found))
                self._counts[0, layer - 1, heads] += found
                self._counts[1, layer - 1, heads] += len(rows)

        return add

    def rates(self) -> dict[str, list[float]] | None:
        """Return the share of successes over all ranks, by layer. All ranks call it; all samples together.

        Returns:
            {"layer03": [share of each KV head]}; None where nothing was selected.
        """
        with watched("evaluation"):
            dist.all_reduce(self._counts)
        found, count = self._counts.cpu().numpy()
        rates = {
            f"layer{layer + 1:02d}": (found[layer] / count[layer]).tolist()
            for layer in range(len(count))
            if count[layer].all()
        }
        return rates or None


def _queries(
    packed: PackedDocuments, samples: Sequence[Sample], layout: ShardLayout
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """List for each needle this rank's rows that need it, and the blocks that it touches.

    Example: blocks of 4, a sample from position 8 on, a needle at its tokens 3 to 6, the answer at its tokens
    9 and 10: the queries at positions 16 and 17 need block 2 or 3.
    """
    positions = np.concatenate([np.arange(start, stop) for start, stop in layout.ranges])
    size, wanted = layout.block_size, []
    for number, place in packed.placed:
        sample = samples[number]
        for needle in sample.needles:
            start, stop = sample.answers[needle.answer]
            rows = np.flatnonzero((positions >= place + start - 1) & (positions < place + stop - 1))
            if len(rows):
                blocks = np.arange((place + needle.start) // size, (place + needle.stop - 1) // size + 1)
                wanted.append((rows, blocks))
    return wanted
