"""Write Megatron's torch_dist format by PyTorch's own file writer.

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

from msa_train.checkpoint.all_ranks import CheckpointError, at_work, run_on_all_ranks
from msa_train.checkpoint.torch_dist.safe_pickles import COMMON_NAME

Shards = dict[str, list[ShardedTensor | ShardedObject]]


class _Bytes(io.BytesIO):
    """Hand out a view of plain bytes.

    PyTorch writes `getbuffer()`. When that write fails, the view is left in the frames of a traceback, and
    Python crashes on a BytesIO's own view when garbage collection clears the BytesIO first.
    """

    def getbuffer(self) -> memoryview:
        """Return the content, read only."""
        return memoryview(self.getvalue())


class _SavePlanner(mcore_torch.MCoreSavePlanner):
    """Give objects to the writer as `_Bytes`, and tensors without the buffer that they are a part of."""

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        data = super().resolve_data(write_item)
        return _Bytes(data.getvalue()) if isinstance(data, io.BytesIO) else _alone(data)


class _Writer(FileSystemWriter):
    """Write as torch does, and mark the time in which this rank works and does not wait for others."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """See torch."""
        with at_work():
            return super().write_data(plan, planner)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """See torch."""
        with at_work():
            super().finish(metadata, results)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """Give a tensor a storage that ends where it ends, over the same memory.

    PyTorch stores tensors with the whole storage that they are views of, so it would copy each one first.
    """
    if not tensor.numel() or not tensor.is_contiguous():
        return tensor
    memory = tensor.view(-1).view(torch.uint8).numpy()
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


def shards_of(sharded_state: dict[str, Any]) -> Shards:
    """List what this rank holds, by key; `shares` chooses what it writes of that.

    Args:
        sharded_state: nested, its leaves are ShardedTensors and ShardedObjects.
    """
    grouped, _, _ = mcore_torch._replace_state_dict_keys_with_sharded_keys(sharded_state)
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

    # a failure here is exchanged before PyTorch's own collectives begin, in which others would wait for it
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
    run_on_all_ranks(lambda: save_config(config, str(folder)) if rank == 0 else None, group)


def first_failure(error: CheckpointException) -> str:
    """Find the cause in what PyTorch raises on all ranks, e.g. "rank 1: OSError: No space left on device"."""
    rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
    return f"rank {rank}: {type(cause).__name__}: {cause}"


def _own(work: Any, group: dist.ProcessGroup | None) -> Any:
    """Do work on all ranks and return this rank's result, which is not sent around."""
    result: list[Any] = []
    run_on_all_ranks(lambda: result.append(work()), group)
    return result[0]
