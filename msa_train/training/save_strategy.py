"""Megatron's torch_dist format written by PyTorch's own file writer.

Megatron's writer copies through pinned memory and streams of CUDA, so it fails without a GPU, and its saving
waits in collectives of the default group, which a thread beside the training must not enter. The files are
the same; each is synced to the disk before it is closed. Two undocumented helpers are used, which are alike
in Megatron-core 0.16.1 to 0.19.2.
"""

import io
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies import torch as mcore_torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from msa_train.model.checkpoint_pickles import COMMON_NAME
from msa_train.training.together import CheckpointError, at_work, together

Shards = dict[str, list[ShardedTensor | ShardedObject]]


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


class _Writer(FileSystemWriter):
    """torch's, which says when it writes and does not wait for others."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """See torch."""
        with at_work():
            return super().write_data(plan, planner)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """See torch."""
        with at_work():
            super().finish(metadata, results)


def shards_to_write(sharded_state: dict[str, Any]) -> Shards:
    """What this rank writes, by key: of everything that several ranks hold, one of them writes it.

    Args:
        sharded_state: nested, its leaves are ShardedTensors and ShardedObjects.
    """
    grouped, _, _ = mcore_torch._replace_state_dict_keys_with_sharded_keys(sharded_state, True)
    return grouped  # type: ignore[return-value]


def write_shards(
    shards: Shards, common: dict[str, Any], folder: Path, group: dist.ProcessGroup | None
) -> None:
    """Write Megatron's files; all ranks call it, and a failure of any is raised on all.

    Args:
        shards: of this rank, on the host.
        common: plain data, the same on all ranks.
        folder: exists and is empty; all ranks see it.
        group: all ranks.

    Raises:
        CheckpointError: with rank and cause.
    """
    rank = dist.get_rank()

    def prepare() -> dict[str, Any]:
        if rank == 0:
            torch.save(common, folder / COMMON_NAME)
        return mcore_torch.mcore_to_pyt_state_dict(shards, False)  # type: ignore[arg-type]

    state = _own(prepare, group)
    planner = _SavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    # nothing to copy ahead: all is on the host, and this thread must not touch a GPU
    writer = _Writer(str(folder), sync_files=True, per_thread_copy_ahead=0)
    try:
        save(state, storage_writer=writer, planner=planner, process_group=group)
    except CheckpointException as error:
        raise CheckpointError(first_failure(error)) from error
    # last, for it says that the rest is there
    config = CheckpointingConfig("torch_dist", 1)
    together(lambda: save_config(config, str(folder)) if rank == 0 else None, group)


def first_failure(error: CheckpointException) -> str:
    """The cause within what PyTorch raises on all ranks, e.g. "rank 1: OSError: No space left on device"."""
    rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
    return f"rank {rank}: {type(cause).__name__}: {cause}"


def _own(work: Any, group: dist.ProcessGroup | None) -> Any:
    """This rank's result of work that all ranks do; it is not sent around."""
    result: list[Any] = []
    together(lambda: result.append(work()), group)
    return result[0]
