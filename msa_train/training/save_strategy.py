"""Megatron's torch_dist format written by PyTorch's own file writer.

Megatron's writer copies through pinned memory and streams of CUDA, so it fails without a GPU. The files are
the same; each is synced to the disk before it is closed. Two undocumented helpers are used, which are alike
in Megatron-core 0.16.1 to 0.19.2.
"""

import inspect
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import torch as mcore_torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.state_dict_saver import save


class _Bytes(io.BytesIO):
    """Hands out a view of plain bytes.

    PyTorch writes `getbuffer()`. When that write fails, the view is left in the frames of a traceback, and
    Python crashes on a BytesIO's own view when garbage collection clears the BytesIO first.
    """

    def getbuffer(self) -> memoryview:
        """The content, read only."""
        return memoryview(self.getvalue())


class _SavePlanner(mcore_torch.MCoreSavePlanner):
    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        data = super().resolve_data(write_item)
        return _Bytes(data.getvalue()) if isinstance(data, io.BytesIO) else data


class SaveStrategy(mcore_torch.TorchDistSaveShardedStrategy):
    """Synchronous save on any device."""

    gate: Callable[[], object] | None = None
    "called on every rank when it is ready to write; it raises where another rank is not"
    reached_gate: bool = False
    written: bool = False

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        """Write this rank's shards; a failure of any rank is raised on all of them.

        Args:
            sharded_state_dict: nested, its leaves are ShardedTensors and ShardedObjects.
            checkpoint_dir: an existing folder that all ranks see.
        """
        grouped, _, _ = mcore_torch._replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        state = mcore_torch.mcore_to_pyt_state_dict(grouped, False)
        planner = _SavePlanner(
            dedup_replicated_tensors=not self.keep_only_main_replica, flatten_state_dict=False
        )
        self.reached_gate = True
        if self.gate is not None:
            self.gate()
        writer = FileSystemWriter(str(checkpoint_dir), sync_files=True)
        save(state, storage_writer=writer, planner=planner)
        self.written = True


def build_save_strategy(gate: Callable[[], object] | None = None) -> SaveStrategy:
    """The strategy under any supported version, which differ in the constructor.

    Args:
        gate: see SaveStrategy.gate.
    """
    parameters = inspect.signature(mcore_torch.TorchDistSaveShardedStrategy.__init__).parameters
    arguments: tuple[Any, ...] = ("torch_dist", 1) if "backend" in parameters else ()
    strategy = SaveStrategy(*arguments)
    strategy.gate = gate
    return strategy
