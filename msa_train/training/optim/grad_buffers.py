"""Collect gradients in two flat buffers, dense and expert, and sum them over their own groups of ranks.

Every rank runs the dense parameters on its own tokens, so their gradient is the sum over all data and context
parallel ranks. An expert runs on one rank of each expert-parallel group, which has the tokens of the whole
group already; its gradient is the sum over its replicas in the other groups.

Example: 8 ranks with cp 2 and ep 4. Dense gradients are summed over all 8, those of rank 5's experts over
ranks 1 and 5. In the norm dense gradients count once, and rank 5 adds up experts' squares with 4, 6 and 7.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from msa_train.config import GradsDtype
from msa_train.config.optimizer_bytes import PIECE_ELEMENTS
from msa_train.parallel.comm.fault_watch import watched
from msa_train.parallel.process_groups import Groups
from msa_train.training.optim.rounding import add_to_bf16, to_bf16

# Gradients are reduced in pieces of this many elements, 128 MiB in fp32: a collective of the whole buffer
# would need as much again for its copy on gloo. The 13.1B dense parameters of m3 would take 391 pieces.
_BUCKET_ELEMENTS = 2**25


class GradBuffers:
    """Collect gradients as they are made and sum them over the ranks that share the parameters.

    Accumulates in fp32 (fp64 for fp64 parameters), over micro-batches too: 4 bytes per parameter on this
    rank, or 2 with bf16 buffers. There each sum is made in fp32 and rounded back stochastically, one rounding
    for each micro-batch after the first and one for all ranks together; what travels is fp32. Losses must
    already be divided by global counts: the reduction is a plain sum, whatever the layout.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        groups: Groups,
        grads_dtype: GradsDtype = GradsDtype.fp32,
    ) -> None:
        self.groups = groups
        is_bf16 = grads_dtype is GradsDtype.bf16
        # Megatron's mark: parameters that data-parallel ranks do not share are not to be all-reduced
        is_expert = [not getattr(p, "allreduce", True) for p in parameters]
        self.dense = _Buffer([p for p, e in zip(parameters, is_expert, strict=True) if not e], is_bf16)
        self.expert = _Buffer([p for p, e in zip(parameters, is_expert, strict=True) if e], is_bf16)

    def zero(self) -> None:
        """Start a new step."""
        self.dense.flat.zero_()
        self.expert.flat.zero_()

    def reduce(self) -> None:
        """Sum dense gradients over data and context parallel ranks, expert gradients over their replicas."""
        for buffer, group in (
            (self.dense, self.groups.dp_cp),
            (self.expert, self.groups.expert_dp),
        ):
            if group.size() > 1:
                for piece in buffer.flat.split(_BUCKET_ELEMENTS):
                    total = piece.float() if piece.dtype == torch.bfloat16 else piece
                    with watched("grad"):
                        dist.all_reduce(total, group=group)
                    if total is not piece:
                        piece.copy_(to_bf16(total, salt=1))

    def norm(self) -> float:
        """Return the global L2 norm, after `reduce`; each expert counts once. The same on every rank.

        Squares are made in fp32 and added up in fp64, in pieces of 16.8M elements one after another: 192 MiB
        of temporaries. A buffer of up to one piece gives the bits of one sum over it.
        """
        dense, expert = sum_of_squares(self.dense.flat), sum_of_squares(self.expert.flat)
        # Dense gradients are the same on all ranks by now and need no exchange; each rank of an expert-
        # parallel group has other experts, so their squares add up.
        with watched("grad_norm"):
            dist.all_reduce(expert, group=self.groups.ep)
        return float((dense + expert).sqrt())

    @property
    def is_bf16(self) -> bool:
        """Tell whether the buffers are bf16: then the update should scale, which `scale` would round."""
        return self.dense.flat.dtype == torch.bfloat16

    def scale(self, factor: float) -> None:
        """Multiply all gradients."""
        self.dense.flat.mul_(factor)
        self.expert.flat.mul_(factor)

    def view(self, parameter: nn.Parameter) -> Tensor:
        """Return this parameter's gradient, shaped like it: a view of the buffer, fp32, fp64 or bf16."""
        views = self.dense.views if id(parameter) in self.dense.views else self.expert.views
        return views[id(parameter)]


class _Buffer:
    """Hold the gradients of some parameters one after another."""

    def __init__(self, parameters: Sequence[nn.Parameter], is_bf16: bool) -> None:
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
        dtype = torch.bfloat16 if is_bf16 else dtype
        device = parameters[0].device if parameters else None
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=dtype, device=device)
        self.views: dict[int, Tensor] = {}
        offset = 0
        for parameter in parameters:
            self.views[id(parameter)] = self.flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
            # Megatron's names: what adds its gradients up by itself puts them here and sets the mark
            parameter.main_grad = self.views[id(parameter)]  # type: ignore[attr-defined]
            parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
            parameter.register_post_accumulate_grad_hook(self._collect)

    def _collect(self, parameter: Tensor) -> None:
        """Add a gradient that was just made and drop it: bf16 gradients never add up to the nearest bf16."""
        grad, is_there = parameter.grad, parameter.grad_added_to_main_grad  # type: ignore[attr-defined]
        parameter.grad, parameter.grad_added_to_main_grad = None, False  # type: ignore[attr-defined]
        if grad is None or is_there:
            return
        view = self.views[id(parameter)]
        if view.dtype == torch.bfloat16:
            add_to_bf16(view, grad, piece=PIECE_ELEMENTS)
        else:
            view.add_(grad)


def sum_of_squares(flat: Tensor) -> Tensor:
    """Return a scalar, fp64."""
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    for piece in flat.split(PIECE_ELEMENTS):
        wide = piece.float() if piece.dtype == torch.bfloat16 else piece
        total += wide.square().sum(dtype=torch.float64)
    return total
