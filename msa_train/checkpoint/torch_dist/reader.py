"""Read torch_dist checkpoints by Megatron's functions, so that nothing in a checkpoint is executed.

Megatron and PyTorch unpickle `.metadata` and stored objects as they are. Here Megatron's own functions run
with two other classes in the places that they name: a reader whose metadata are looked through first, and a
planner whose objects are plain values. These places are alike in Megatron-core 0.16.1 to 0.19.2.
"""

import io
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import torch as mcore_torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from msa_train.checkpoint.torch_dist.node_reads import Wants, read_wanted
from msa_train.checkpoint.torch_dist.regions import Region
from msa_train.checkpoint.torch_dist.safe_pickles import COMMON_NAME, check_object, read_metadata

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# a rank may be this far behind the others of its node with its files
_TIMEOUT = timedelta(hours=2)


class _Reader(FileSystemReader):
    """Read `.metadata` once, however often it is asked for, and of the tensors only what is wanted.

    16 MB of `.metadata` take a second, see `safe_pickles`.
    """

    def __init__(self, path: Path | str, strategy: "LoadStrategy") -> None:
        super().__init__(path)
        self._read: Metadata | None = None
        self._strategy = strategy

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._read is None:
            self._read = cast(Metadata, read_metadata(Path(self.path)))
            if self._read.storage_meta is None:
                self._read.storage_meta = StorageMeta()
            self._read.storage_meta.load_id = self.load_id
        return self._read

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """See torch; objects as there, of tensors each byte once on a node."""
        objects = [item for item in plan.items if item.type is LoadItemType.BYTE_IO]
        tensors = [item for item in plan.items if item.type is not LoadItemType.BYTE_IO]
        error: Exception | None = None
        wants: Wants = []
        targets: list[tuple[ReadItem, Tensor]] = []
        # what fails here is raised after the others of the node have been served
        try:
            super().read_data(replace(plan, items=objects), planner)
            targets = [(item, planner.resolve_tensor(item).detach()) for item in tensors]
            wants = [(self._region(item), target) for item, target in targets]
        except Exception as caught:
            error = caught
        self._strategy.read_together(wants, Path(self.path))
        if error is not None:
            raise error
        for item, target in targets:
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _region(self, item: ReadItem) -> Region:
        """Describe what of a stored piece is wanted."""
        index, metadata = item.storage_index, self.read_metadata()
        entry = metadata.state_dict_metadata[index.fqn]
        assert isinstance(entry, TensorStorageMetadata), f"{index.fqn} is an object"
        assert index.index is not None, "plans of torch name the piece"
        place: _StorageInfo = metadata.storage_data[index]
        if place.transform_descriptors:
            raise ValueError(
                f"{place.relative_path}: is stored in another way; use a checkpoint of msa-train"
            )
        return Region(
            file=place.relative_path,
            offset=place.offset,
            length=place.length,
            sizes=tuple(entry.chunks[index.index].sizes),
            begin=tuple(item.storage_offsets),
            wanted=tuple(item.lengths),
            dtype=str(entry.properties.dtype).removeprefix("torch."),
        )


class _Planner(mcore_torch.MCoreLoadPlanner):
    """Take objects only if they are plain values."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        check_object(value.getvalue(), read_item.dest_index.fqn)
        plain = io.BytesIO()
        # the base class reads with weights_only=False what is written here, never what was stored
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def _with_ours(method: Callable[..., Any], strategy: "LoadStrategy") -> Any:
    """Copy a method of Megatron's that finds our reader and planner under the names of its own.

    A copy with globals of its own: other users of Megatron in this process keep theirs.
    """

    def reader(path: Path | str, *_args: Any, **_named: Any) -> _Reader:
        return _Reader(path, strategy)

    function = cast(FunctionType, method)
    names = {"_get_filesystem_reader": reader, "MCoreLoadPlanner": _Planner}
    return FunctionType(
        function.__code__, function.__globals__ | names, function.__name__, function.__defaults__
    )


_Strategy = mcore_torch.TorchDistLoadShardedStrategy
for _method in (_Strategy.load, _Strategy.load_tensors_metadata, _Strategy.load_sharded_metadata):
    assert "_get_filesystem_reader" in _method.__code__.co_names, "this Megatron-core reads in another way"
assert "MCoreLoadPlanner" in _Strategy.load.__code__.co_names, "this Megatron-core plans in another way"


class LoadStrategy(_Strategy):
    """Serve as the `sharded_strategy` of dist_checkpointing.load.

    Args:
        node: the ranks of this node, which read together; None: each reads for itself.
    """

    def __init__(self, node: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self._node = node
        self._has_read = False

    def read_together(self, wants: Wants, folder: Path) -> None:
        """Read with the other ranks of the node, once for each load."""
        self._has_read = True
        read_wanted(wants, folder, self._node)

    def serve_others(self) -> None:
        """Do what a rank that failed before it could read owes its node, which would wait for it."""
        if self._node is not None and not self._has_read:
            read_wanted([], Path(), self._node)

    def load(self, *args: Any, **named: Any) -> Any:
        """See Megatron."""
        return _with_ours(_Strategy.load, self)(self, *args, **named)

    def load_tensors_metadata(self, *args: Any, **named: Any) -> Any:
        """See Megatron."""
        return _with_ours(_Strategy.load_tensors_metadata, self)(self, *args, **named)

    def load_sharded_metadata(self, *args: Any, **named: Any) -> Any:
        """See Megatron."""
        return _with_ours(_Strategy.load_sharded_metadata, self)(self, *args, **named)


def node_name() -> str:
    """Name this machine: equal for all processes on it, whatever their containers are called."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return socket.gethostname()


@contextmanager
def node_group(names: Sequence[str]) -> Iterator[dist.ProcessGroup | None]:
    """Make the group of this node's ranks for a while, None where this rank is alone. All ranks call it.

    Args:
        names: `node_name` of each rank. 32 groups are made at 256 ranks on nodes of 8.
    """
    own: dist.ProcessGroup | None = None
    for name in dict.fromkeys(names):
        ranks = [rank for rank, other in enumerate(names) if other == name]
        if len(ranks) < 2:
            continue
        group = dist.new_group(ranks, backend="gloo", timeout=_TIMEOUT)
        if dist.get_rank() in ranks:
            own = cast(dist.ProcessGroup, group)
    try:
        yield own
    finally:
        if own is not None:
            dist.destroy_process_group(own)


def check_common(folder: Path) -> None:
    """Refuse common data that are more than plain values; Megatron reads them by torch's default.

    Raises:
        ValueError: one line.
    """
    path = folder / COMMON_NAME
    if path.exists():
        check_object(path.read_bytes(), COMMON_NAME)
