"""Read and write what ZeRO-3 keeps in files, for checkpoints: sub-group by sub-group, by DeepSpeed's swapper.

DeepSpeed cuts the parameters of a rank into sub-groups, and brings them in, updates them and writes them out
one after the other, through buffers that it has from the start. Here they come in through the same buffers:

    saving    what a checkpoint lists are tensors that get their values when they are copied (`deferred`), in
              the order of the sub-groups, so each file is read once
    loading   the checkpoint is read into files without a name, then each sub-group comes in, is filled and
              written out

So neither takes memory beside those buffers. Sub-groups and weights of less than 1 MiB are always in memory.

By arithmetic for 70B parameters in bf16 on 16 ranks with `sub_group_size` 50M: 88 sub-groups of each rank;
saving reads 61 GB and loading writes as much, each in pieces of 0.6 GB.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msa_train.checkpoint.torch_dist.format_versions import STATE_NAMES
from msa_train.checkpoint.torch_dist.staging import deferred
from msa_train.training.engines.deepspeed.swap_folder import SwapFolder

_MOMENTS = STATE_NAMES[1:]


class SwappedStates:
    """Bring in sub-groups of one engine.

    Args:
        folder: of the files that checkpoints are read into.
        wrapper: `engine.optimizer` of DeepSpeed, with zero_stage 3.
    """

    def __init__(self, folder: SwapFolder, wrapper: Any) -> None:
        self.folder = folder
        self._wrapper = wrapper
        # DeepSpeed 0.19 reads a parameter ahead twice that is used twice soon, and fails
        coordinator = wrapper.parameter_offload.get_param_coordinator()
        coordinator._PartitionedParameterCoordinator__prefetch_nvme = False
        self._resident: int | None = None
        "sub-group that was brought in to be read"
        self._slice: tuple[int, Tensor] | None = None
        "number of the parameter whose slice was read last, and that slice"

    def reserve(self) -> None:
        """Take the room on the disk that the run will need, and make sure that what was written is there.

        DeepSpeed looks at no result of a write: on a full disk it would go on with wrong numbers. Files that
        are there whole are only written over.

        Raises:
            OSError: the disk is full.
        """
        wrapper = self._wrapper
        for number, parameters in enumerate(wrapper.fp16_groups):
            for parameter in parameters:
                if is_in_file(parameter):
                    swapper, count = parameter.nvme_swapper, parameter.ds_tensor.ds_numel
                    num_bytes = swapper._io_aligned_numel(count) * parameter.dtype.itemsize
                    _reserve(Path(swapper.get_path(parameter, must_exist=True)), num_bytes)
            if self.has(number):
                swapper, key = wrapper.optimizer_swapper, wrapper.fp32_partitioned_groups_flat[number]
                num_bytes = swapper._io_aligned_numel(wrapper.fp16_partitioned_groups_flat_numel[number]) * 4
                for name in (key.ds_id, *(f"{name}-{key.ds_id}" for name in _MOMENTS)):
                    _reserve(
                        Path(swapper.swap_folder, f"{name}.tensor.swp"), num_bytes, is_new=name != key.ds_id
                    )

    def has(self, number: int) -> bool:
        """Tell whether the optimizer's state of a sub-group is in files."""
        return self._wrapper.swap_optimizer and self._wrapper._swappable_optimizer_subgroup(number)

    def has_weights(self, number: int) -> bool:
        """Tell whether weights of a sub-group, the model's own, are in files."""
        return self._wrapper.fp16_partitioned_groups_flat[number] is None

    def deferred(self, number: int) -> list[Tensor]:
        """Return fp32 weights and moments of a sub-group: [n] each, whose values come when copied."""
        count = self._wrapper.fp16_partitioned_groups_flat_numel[number]

        def read(name: str, begin: int, end: int) -> Tensor:
            return self._read(number, name)[begin:end]

        return [
            deferred(
                (count,), torch.float32, lambda begin, end, name=name: read(name, begin, end), turn=number
            )
            for name in STATE_NAMES
        ]

    def _read(self, number: int, name: str) -> Tensor:
        """Bring a sub-group in, unless it is there, and return one of its tensors, flat."""
        key = self._wrapper.fp32_partitioned_groups_flat[number]
        state = self._wrapper.optimizer.state[key]
        if name in _MOMENTS and name not in state:
            # not updated yet
            return torch.zeros(self._wrapper.fp16_partitioned_groups_flat_numel[number])
        if self._resident != number:
            self.release()
            self._wrapper._optimizer_states_and_gradient_swap_in(number)
            self._resident = number
        return (key if name not in _MOMENTS else state[name]).detach().view(-1)

    def slice_of(self, parameter: Any) -> Tensor:
        """Return a slice that is in a file, padding included, [n]: its values come when they are copied."""
        kept = parameter.ds_tensor

        def read(begin: int, end: int) -> Tensor:
            if self._slice is None or self._slice[0] != parameter.ds_id:
                self.drop_prefetched()
                whole = torch.empty(kept.ds_numel, dtype=parameter.dtype)
                if is_there(parameter):
                    whole.copy_(kept.view(-1))
                else:
                    parameter.nvme_swapper.swap_into_buffer(parameter, whole)
                self._slice = parameter.ds_id, whole
            return self._slice[1][begin:end]

        return deferred((kept.ds_numel,), parameter.dtype, read)

    def release(self) -> None:
        """Let go what was brought in to be read: the next step needs the buffers."""
        self._slice = None
        if self._resident is not None:
            self._wrapper._release_swap_buffers(self._resident)
            self._resident = None

    @contextmanager
    def opened(self, number: int) -> Iterator[list[Tensor]]:
        """Bring a sub-group in, give its fp32 weights and moments, [n] each, and write them out again."""
        self.release()
        wrapper = self._wrapper
        key = wrapper.fp32_partitioned_groups_flat[number]
        wrapper._optimizer_states_and_gradient_swap_in(number)
        state = wrapper.optimizer.state[key]
        for name in _MOMENTS:
            if name not in state:
                # in memory until they are written out
                state[name] = torch.zeros_like(key, requires_grad=False)
        state.setdefault("step", torch.tensor(0.0))
        yield [key.detach(), *(state[name] for name in _MOMENTS)]
        self.put_weights(number)
        wrapper._optimizer_states_and_gradient_swap_out(number)

    def drop_prefetched(self) -> None:
        """Let go of slices that were read ahead for a pass that did not come, as after a validation.

        They would keep buffers that the next pass needs, in which layers come in another order, and would be
        taken for slices that are always in memory when weights are written.
        """
        listed = [one for group in self._wrapper.fp16_groups for one in group if is_in_file(one)]
        if listed:
            swapper = listed[0].nvme_swapper
            swapper.synchronize_reads()
            # a parameter that is gathered keeps its slice until it is cut again
            ahead = [one for one in listed if is_there(one) and one.ds_status.name == "NOT_AVAILABLE"]
            swapper.remove_partition_and_release_buffers(ahead)

    def put_weights(self, number: int) -> None:
        """Round the fp32 weights of a sub-group in memory to those of the model that are in files."""
        if self.has_weights(number):
            self._wrapper._partitioned_params_swap_out(number)


def is_in_file(parameter: Any) -> bool:
    """Tell whether the slice of a parameter that ZeRO-3 has cut has its place in a file."""
    return getattr(parameter.ds_tensor, "final_location", None) == "nvme"


def is_there(parameter: Any) -> bool:
    """Tell whether the slice of a parameter that has its place in a file is in memory just now, too."""
    return parameter.ds_tensor.status.name == "AVAILABLE"


def _reserve(file: Path, num_bytes: int, *, is_new: bool = False) -> None:
    """Give a file its full size on the disk; one that was written already must have it."""
    if not is_new and (not file.exists() or file.stat().st_size < num_bytes):
        raise OSError(errno.ENOSPC, "was not written whole, the disk is full", str(file))
    handle = os.open(file, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(handle, 0, num_bytes)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None
    finally:
        os.close(handle)
