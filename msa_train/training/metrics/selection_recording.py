"""Writes which blocks a training step's first pack selects, for `msa-simulate --selections`."""

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
# Unions per recording, about: more would serve more layouts and take more space.
_MAX_CHUNKS = 1024


class SelectionLog:
    """The recording of one step: every rank of the first data-parallel replica writes its own queries."""

    def __init__(self, config: RunConfig, groups: Groups, step: int) -> None:
        self.config, self.groups, self.step = config, groups, step
        self._recorders: list[SelectionRecorder] = []
        self._opened = False

    def open(self, pack: Pack, layout: ShardLayout) -> OnSelection | None:
        """What layers hand their selection to: (layer number, block ids [T, M, topk]).

        None for all packs but the first.
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
                topk=self.config.attention.topk,
                first_token=start,
                num_tokens=stop - start,
                chunk_tokens=chunk,
                cu_seqlens=cu_seqlens,
            )
            for start, stop in layout.ranges
        ]
        return self._add

    def _add(self, layer: int, block_indices: Tensor) -> None:
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
    """Queries per recorded union: the same on all ranks, a divisor of every part of every rank.

    Example: 1,048,576 tokens in blocks of 128 on 64 ranks -> 1024.
    """
    edges = math.gcd(
        layout.seq_len, *(edge for ranges in layout.plan.ranges for part in ranges for edge in part)
    )
    blocks = edges // layout.block_size
    wanted = max(1, layout.num_blocks // _MAX_CHUNKS)
    return layout.block_size * max(n for n in range(1, wanted + 1) if blocks % n == 0)
