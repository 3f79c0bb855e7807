"""Read torch_dist checkpoints by Megatron's functions, so that nothing in a checkpoint is executed.

Megatron and PyTorch unpickle `.metadata` and stored objects as they are. Here Megatron's own functions run
with two other classes in the places that they name: a reader whose metadata are looked through first, and a
planner whose objects are plain values. These places are alike in Megatron-core 0.16.1 to 0.19.2.
"""

import io
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing.strategies import torch as mcore_torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from msa_train.checkpoint.torch_dist.safe_pickles import COMMON_NAME, check_object, read_metadata


class _Reader(FileSystemReader):
    """Read `.metadata` once, however often it is asked for: 16 MB take a second, see `safe_pickles`."""

    def __init__(self, path: Path | str) -> None:
        super().__init__(path)
        self._read: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._read is None:
            self._read = cast(Metadata, read_metadata(Path(self.path)))
            if self._read.storage_meta is None:
                self._read.storage_meta = StorageMeta()
            self._read.storage_meta.load_id = self.load_id
        return self._read


class _Planner(mcore_torch.MCoreLoadPlanner):
    """Take objects only if they are plain values."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        check_object(value.getvalue(), read_item.dest_index.fqn)
        plain = io.BytesIO()
        # the base class reads with weights_only=False what is written here, never what was stored
        torch.save(torch.load(value, weights_only=True), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def _reader(path: Path | str, *_args: Any, **_named: Any) -> _Reader:
    """Stand in for Megatron's `_get_filesystem_reader`, whatever else it is given."""
    return _Reader(path)


def _with_ours(method: Callable[..., Any]) -> Any:
    """Copy a method of Megatron's that finds our reader and planner under the names of its own.

    A copy with globals of its own: other users of Megatron in this process keep theirs.
    """
    function = cast(FunctionType, method)
    names = {"_get_filesystem_reader": _reader, "MCoreLoadPlanner": _Planner}
    assert "_get_filesystem_reader" in function.__code__.co_names, "this Megatron-core reads in another way"
    return FunctionType(
        function.__code__, function.__globals__ | names, function.__name__, function.__defaults__
    )


class LoadStrategy(mcore_torch.TorchDistLoadShardedStrategy):
    """Serve as the `sharded_strategy` of dist_checkpointing.load."""

    load = _with_ours(mcore_torch.TorchDistLoadShardedStrategy.load)
    load_tensors_metadata = _with_ours(mcore_torch.TorchDistLoadShardedStrategy.load_tensors_metadata)
    load_sharded_metadata = _with_ours(mcore_torch.TorchDistLoadShardedStrategy.load_sharded_metadata)


assert "MCoreLoadPlanner" in LoadStrategy.load.__code__.co_names, "this Megatron-core plans in another way"


def check_common(folder: Path) -> None:
    """Refuse common data that are more than plain values; Megatron reads them by torch's default.

    Raises:
        ValueError: one line.
    """
    path = folder / COMMON_NAME
    if path.exists():
        check_object(path.read_bytes(), COMMON_NAME)
