"""Write which blocks a training step's first pack selects, for `msa-simulate --selections`.

    run_dir/selections/step_00000100/tokens_0000004096.npz     queries from 4,096 on, all layers of one rank
    run_dir/selections/step_00000100/pp_1/...                  with pipeline stages, by stage

Of a chunk, some consecutive queries, only the union of their blocks is kept, one bit for each block and KV
head. At 1M tokens in blocks of 128 there are 1,024 chunks of 1,024 queries: a layer takes 1,024 x 4 heads x
8,192 bits, 4 MiB over all ranks before compression, and the 57 MSA layers of m3 take 228 MiB.
"""

import math
from pathlib import Path

from torch import Tensor

from msa_train.config import RunConfig
from msa_train.data import Pack
from msa_train.model.pack_forward import OnSelection
from msa_train.parallel.process_groups import Groups
from msa_train.parallel.selection_file import SelectionRecorder
from msa_train.parallel.sharding.shard_layout import ShardLayout

FOLDER_NAME = "selections"
# Unions per recording, about: more would serve more layouts and take more space, in proportion.
_MAX_CHUNKS = 1024


class SelectionLog:
    """Record one step: every rank of the first data-parallel replica writes its own queries."""

    def __init__(self, config: RunConfig, groups: Groups, step: int, topk: int = 0) -> None:
        """Open nothing yet; topk: blocks of a query in this stage, 0: attention.topk."""
        self.config, self.groups, self.step = config, groups, step
        self._topk = topk or config.attention.topk
        self._recorders: list[SelectionRecorder] = []
        self._opened = False

    def open(self, pack: Pack, layout: ShardLayout) -> OnSelection | None:
        """Open the recording of a pack: return what layers hand their selection to.

        That takes a layer's number, from 1 on, and block ids [T, M, topk] int32: T tokens of this rank, M KV
        heads, -1 for none.

        Args:
            pack: the whole pack.
            layout: this rank's share of it.

        Returns:
            None for all packs but the first, and on other data-parallel ranks.
        """
        if self._opened or self.groups.dp_rank != 0:
            return None
        self._opened = True
        chunk, cu_seqlens = chunk_tokens(layout), pack.cu_seqlens.tolist()
        self._recorders = [
            SelectionRecorder(
                seq_len=layout.seq_len,
                block_size=layout.block_size,
                num_kv_heads=self.config.model.num_kv_heads,
                topk=self._topk,
                first_token=start,
                num_tokens=stop - start,
                chunk_tokens=chunk,
                cu_seqlens=cu_seqlens,
            )
            for start, stop in layout.ranges
        ]
        return self._add

    def _add(self, layer: int, block_indices: Tensor) -> None:
        """Deal a layer's rows to the recorders of this rank's ranges, which lie one after another."""
        rows = block_indices.cpu().numpy()
        for recorder in self._recorders:
            part, rows = rows[: recorder.num_tokens], rows[recorder.num_tokens :]
            recorder.add(layer, part)

    def save(self) -> None:
        """Write this rank's parts, if its layers selected anything."""
        folder = Path(self.config.run_dir) / FOLDER_NAME / f"step_{self.step:08d}"
        if self.groups.pp_size > 1:
            # Layers of one stage make a recording of their own.
            folder /= f"pp_{self.groups.pp_rank}"
        for recorder in self._recorders:
            if recorder.has_layers:
                path = folder / f"tokens_{recorder.first_token:010d}.npz"
                recorder.save(path, f"{self.config.name}, step {self.step}")


def chunk_tokens(layout: ShardLayout) -> int:
    """Compute the queries per recorded union: the same on all ranks, a divisor of every part of every rank.

    All edges of parts are multiples of some number of blocks; the chunk is the largest divisor of it up to
    num_blocks / 1,024.

    Example: 1,048,576 tokens in blocks of 128 are 8,192 blocks, so up to 8 in a chunk. On 256 ranks parts
    have 32 blocks, with zigzag 16: chunks of 8 blocks, 1,024 tokens. 65,536 tokens are 512 blocks: chunks of
    one block, 128 tokens.
    """
    edges = math.gcd(
        layout.seq_len, *(edge for ranges in layout.plan.ranges for part in ranges for edge in part)
    )
    blocks = edges // layout.block_size
    wanted = max(1, layout.num_blocks // _MAX_CHUNKS)
    return layout.block_size * max(n for n in range(1, wanted + 1) if blocks % n == 0)
