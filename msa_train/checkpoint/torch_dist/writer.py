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
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper
from torch.futures import Future

from msa_train.checkpoint.all_ranks import CheckpointError, at_work, run_on_all_ranks
from msa_train.checkpoint.torch_dist.safe_pickles import COMMON_NAME, without_collection

# file of a rank, and offset and length of each item of its plan
_Places = tuple[str, list[tuple[int, int]]]
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


class ShardWriter:
    """Write the checkpoints of one run. All ranks make one and call it alike.

    Rank 0 plans once: it checks that the boxes of all ranks make up whole tensors. In later saves with the
    same boxes only places in files are exchanged, 10 bytes for each box: 1 MB on each rank at 256 of them.

    Args:
        group: all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self._planned: SavePlan | None = None
        "what this rank asked for when it was planned"
        self._plan: SavePlan | None = None
        "what it was given"
        self._metadata: Metadata | None = None
        "of all ranks; rank 0"
        self._indexes: list[list[MetadataIndex]] = []
        "boxes and objects of each rank, in the order of its plan; rank 0"

    def write(self, shards: Shards, common: dict[str, Any], folder: Path) -> None:
        """Write Megatron's files; all ranks call it, and a failure of any is raised on all.

        Args:
            shards: of this rank, on the host.
            common: plain data, the same on all ranks.
            folder: exists and is empty; all ranks see it.

        Raises:
            CheckpointError: with rank and cause.
        """
        rank = dist.get_rank()
        # to a planner without its own flattening, and without copies of what is on the host already
        planner = _SavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        writer = _Writer(str(folder), sync_files=True, per_thread_copy_ahead=0)

        def prepare() -> SavePlan:
            if rank == 0:
                torch.save(common, folder / COMMON_NAME)
            state = mcore_torch.mcore_to_pyt_state_dict(shards, False)  # type: ignore[arg-type]
            planner.set_up_planner(state, None, rank == 0)
            writer.set_up_storage_writer(rank == 0)
            return writer.prepare_local_plan(planner.create_local_plan())

        # a failure here is exchanged before PyTorch's own collectives, in which others would wait for it
        local = _own(prepare, self.group)
        changed = self._planned is None or self._planned.items != local.items
        if any(run_on_all_ranks(lambda: changed, self.group)):
            self._make_plan(local, planner, writer)
        plan = planner.finish_plan(self._plan)  # type: ignore[arg-type]
        places = run_on_all_ranks(lambda: _places(plan, writer.write_data(plan, planner)), self.group)
        # last, for it says that the rest is there
        run_on_all_ranks(lambda: self._finish(writer, places) if rank == 0 else None, self.group)

    def _make_plan(self, local: SavePlan, planner: SavePlanner, writer: FileSystemWriter) -> None:
        """Let rank 0 put the plans of all ranks together and check them."""

        def whole(plans: list[SavePlan]) -> list[SavePlan]:
            made, metadata = planner.create_global_plan(plans)
            self._indexes = [[item.index for item in plan.items] for plan in made]
            self._metadata = metadata
            return writer.prepare_global_plan(made)

        exchange = _DistWrapper(self.group, True, 0)
        try:
            with without_collection():
                self._plan = exchange.reduce_scatter("plan", lambda: local, whole)
        except CheckpointException as error:
            raise CheckpointError(first_failure(error)) from error
        self._planned = local

    def _finish(self, writer: FileSystemWriter, places: list[_Places]) -> None:
        """Write `.metadata`, which lists all boxes with their places, and what Megatron reads first."""
        assert self._metadata is not None, "rank 0 has planned"
        results = [
            [
                WriteResult(
                    index=index, size_in_bytes=length, storage_data=_StorageInfo(name, offset, length)
                )
                for index, (offset, length) in zip(indexes, own, strict=True)
            ]
            for indexes, (name, own) in zip(self._indexes, places, strict=True)
        ]
        writer.finish(self._metadata, results)
        save_config(CheckpointingConfig("torch_dist", 1), str(writer.path))


def _places(plan: SavePlan, written: Future[list[WriteResult]]) -> _Places:
    """Tell where the items of a plan are, in its order: the file, and offset and length of each."""
    found = {result.index: result.storage_data for result in written.value()}
    ordered = [found[item.index] for item in plan.items]
    names = {place.relative_path for place in ordered}
    assert len(names) <= 1, f"one file of each rank, not {sorted(names)}"
    return next(iter(names), ""), [(place.offset, place.length) for place in ordered]


def first_failure(error: CheckpointException) -> str:
    """Find the cause in what PyTorch raises on all ranks, e.g. "rank 1: OSError: No space left on device"."""
    rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
    return f"rank {rank}: {type(cause).__name__}: {cause}"


def _own(work: Any, group: dist.ProcessGroup | None) -> Any:
    """Do work on all ranks and return this rank's result, which is not sent around."""
    result: list[Any] = []
    run_on_all_ranks(lambda: result.append(work()), group)
    return result[0]
