"""Reach the gradients that DeepSpeed has reduced, before its update: for the norm, clipping and refusal.

DeepSpeed has four optimizers around the client's, and each keeps gradients in a place of its own:

    zero_stage 0             the client's optimizer alone: .grad of every parameter, on every rank
    zero_stage 1 with bf16   a flat fp32 buffer for each group, whole on every rank, which updates its part
    zero_stage 1, 2          for each group the part of this rank
    zero_stage 3             one flat buffer of this rank's parts, in host memory with offload

The update itself stays DeepSpeed's. Where a step is refused, the gradients are dropped as DeepSpeed drops
those of an overflow: weights and moments are not touched.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from msa_train.parallel.comm.fault_watch import watched
from msa_train.parallel.process_groups import Groups
from msa_train.training.optim.grad_buffers import sum_of_squares

ParamGroup = dict[str, Any]
Shares = Iterator[tuple[ParamGroup, list[Tensor]]]


class ReducedGradients(ABC):
    """Hold the gradients of one step, summed over ranks, from the last backward pass to the update."""

    def __init__(self, engine: Any, param_groups: list[ParamGroup], groups: Groups) -> None:
        """Take the place of the gradients.

        Args:
            engine: DeepSpeed's.
            param_groups: of the client's optimizer, in DeepSpeed's order.
            groups: process groups.
        """
        self.engine, self.zero = engine, engine.optimizer
        self.param_groups, self.groups = param_groups, groups

    def begin(self) -> None:  # noqa: B027
        """Begin a step: a parameter without a gradient in it must not keep that of an earlier one."""

    @abstractmethod
    def shares(self) -> Shares:
        """Yield for each group what this rank updates: over all ranks, every number once."""

    def norm(self) -> float:
        """Return the global L2 norm, the same on all ranks; each expert counts once.

        Squares are made in fp32 and added up in fp64; one all-reduce of 8 bytes.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.groups.device)
        for _, tensors in self.shares():
            for tensor in tensors:
                total += sum_of_squares(tensor.reshape(-1)).to(total.device)
        with watched("grad_norm"):
            dist.all_reduce(total, group=self.groups.dp_cp)
        return float(total.sqrt())

    def scale(self, factor: float) -> None:
        """Multiply all gradients."""
        for _, tensors in self.shares():
            for tensor in tensors:
                tensor.mul_(factor)

    def zero_groups(self, is_frozen: Callable[[ParamGroup], bool]) -> None:
        """Forget the gradients of the groups that a stage freezes: they add nothing to the norm."""
        for group, tensors in self.shares():
            for tensor in tensors if is_frozen(group) else ():
                tensor.zero_()

    def step(self) -> None:
        """Update the weights."""
        self.engine.step()

    @abstractmethod
    def discard(self) -> None:
        """Drop the gradients; no weight or moment changes."""


class PlainGradients(ReducedGradients):
    """Of zero_stage 0: the whole gradients on every rank."""

    def shares(self) -> Shares:
        """See ReducedGradients.shares: of copies, the first rank's count."""
        for group in self.param_groups:
            yield group, [p.grad for p in group["params"] if p.grad is not None]

    def norm(self) -> float:
        """See ReducedGradients.norm. Every rank has the gradients of all that it holds."""
        dense, expert = (torch.zeros((), dtype=torch.float64, device=self.groups.device) for _ in range(2))
        for group, tensors in self.shares():
            total = expert if group.get("moe") else dense
            for tensor in tensors:
                total += sum_of_squares(tensor.reshape(-1))
        with watched("grad_norm"):
            dist.all_reduce(expert, group=self.groups.ep)
        return float((dense + expert).sqrt())

    def discard(self) -> None:
        """See ReducedGradients.discard."""
        self.engine.zero_grad()


class FlatGradients(ReducedGradients):
    """Of zero_stage 1 with bf16 weights: fp32 buffers of all gradients, of which each rank updates a part."""

    def shares(self) -> Shares:
        """See ReducedGradients.shares."""
        for group, part in zip(self.param_groups, self.zero.fp32_groups_gradient_flat_partition, strict=True):
            yield group, [part]

    def discard(self) -> None:
        """See ReducedGradients.discard."""
        self.zero.clear_hp_grads()
        self.zero.clear_lp_grads(set_to_none=True)


class PartitionedGradients(ReducedGradients):
    """Of zero_stage 1 and 2."""

    def begin(self) -> None:
        """See ReducedGradients.begin."""
        if self.zero.cpu_offload:
            for part in self.zero.single_partition_of_fp32_groups:
                part.grad.zero_()

    def shares(self) -> Shares:
        """See ReducedGradients.shares."""
        for number, group in enumerate(self.param_groups):
            if self.zero.cpu_offload:
                yield group, [self.zero.single_partition_of_fp32_groups[number].grad]
            else:
                yield group, list(self.zero.averaged_gradients[number])

    def discard(self) -> None:
        """See ReducedGradients.discard."""
        zero, checked = self.zero, self.zero.check_grad_overflow
        zero.check_grad_overflow = True
        zero.check_overflow = lambda partition_gradients=True: setattr(zero, "overflow", True)
        try:
            self.engine.step()
        finally:
            del zero.check_overflow
            zero.check_grad_overflow = checked


class WeightGradients(ReducedGradients):
    """Of zero_stage 3.

    DeepSpeed adds a rank's gradients up in one buffer, sub-group by sub-group, and would copy them once more
    for the update: on the device, in host memory, or to files and back. Here each sub-group is updated from
    its part of that buffer. So nothing is copied, 4 bytes of each of a rank's parameters are saved, and a
    step has the same bits wherever the optimizer's state is.
    """

    def __init__(self, engine: Any, param_groups: list[ParamGroup], groups: Groups) -> None:
        """See ReducedGradients."""
        super().__init__(engine, param_groups, groups)
        zero = self.zero
        # DeepSpeed asks for the norm again and passes the step over where it is no number; -1 says so, too
        self._known_norm = torch.zeros((), device=groups.device)
        zero._get_norm_groups = lambda: [self._known_norm]
        # it divides sums over ranks by their number, and then again by this number over theirs
        zero._gradient_averaging_world_size = lambda params, world_size: 1
        self._cut: list[list[Tensor]] = []
        "of each sub-group the gradients of its parameters, in their order, padding included"
        self._flat: list[Tensor] = []
        "of each sub-group the same as one tensor"
        self._cut_buffer()
        zero._offload_grad_partition_at_boundary = lambda *_: None
        zero._prepare_fp32_grad_for_sub_group = self._give
        zero.unscale_and_clip_grads = lambda number, _norm: self._give(number)

    def _cut_buffer(self) -> None:
        """Find each sub-group's part of DeepSpeed's buffer."""
        at = 0
        for parameters in self.zero.fp16_groups:
            counts = [parameter.partition_numel() for parameter in parameters]
            flat = self.zero.grad_partitions_flat_buffer.narrow(0, at, sum(counts))
            self._flat.append(flat)
            self._cut.append(list(flat.split(counts)))
            at += sum(counts)
        if self.zero.offload_optimizer:
            # the places that it has made for them, which are of no use now
            for part in self.zero.fp32_partitioned_groups_flat:
                part.grad = None

    def _give(self, number: int) -> None:
        """Hand a sub-group's gradients to its update; its weights may just have come from a file."""
        self.zero.fp32_partitioned_groups_flat[number].grad = self._flat[number]

    def begin(self) -> None:
        """See ReducedGradients.begin."""
        self.zero.grad_partitions_flat_buffer.zero_()

    def shares(self) -> Shares:
        """See ReducedGradients.shares."""
        for number, tensors in enumerate(self._cut):
            yield self.param_groups[self.zero.sub_group_to_group_id[number]], tensors

    def norm(self) -> float:
        """See ReducedGradients.norm."""
        norm = super().norm()
        self._known_norm.fill_(norm)
        return norm

    def discard(self) -> None:
        """See ReducedGradients.discard."""
        self._known_norm.fill_(-1.0)
        self.engine.step()


def reduced_gradients(engine: Any, param_groups: list[ParamGroup], groups: Groups) -> ReducedGradients:
    """Find where DeepSpeed keeps its gradients; see the file."""
    places: dict[str, type[ReducedGradients]] = {
        "BF16_Optimizer": FlatGradients,
        "DeepSpeedZeroOptimizer": PartitionedGradients,
        "DeepSpeedZeroOptimizer_Stage3": WeightGradients,
    }
    place = places.get(type(engine.optimizer).__name__, PlainGradients)
    return place(engine, param_groups, groups)
