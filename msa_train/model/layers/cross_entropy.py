"""Compute the language-model loss in token chunks: the [tokens, vocabulary] logits never exist whole.

At a million tokens on 64 ranks and 200K words they would take 13 GB in fp32, on 256 ranks 3.3 GB, and as much
again for their gradient. The vocabulary may be cut over tensor-parallel ranks.

Shapes: T local tokens, H hidden size, V words.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Logits of one chunk: 128 MiB in fp32.
_CHUNK_ELEMENTS = 2**25


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_label: int, tp_group: dist.ProcessGroup
) -> Tensor:
    """Compute the cross-entropy of softmax(hidden @ weight.T) at each label.

    Args:
        hidden: [T, H]; with tensor parallelism the same on all ranks of the group.
        weight: [V / tp_size, H] this rank's rows of the output embedding.
        labels: [T] int64 word ids, `ignore_label` where there is none.
        ignore_label: negative id whose tokens get loss 0.
        tp_group: tensor-parallel group.

    Returns:
        [T] loss in nats, fp32 (fp64 for fp64 inputs). The gradient of `hidden` is this rank's part; the
        caller sums it over the group (Megatron's gather or copy does).
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, ignore_label, tp_group)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ignore_label: int,
        tp_group: dist.ProcessGroup,
    ) -> Tensor:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        first = tp_group.rank() * weight.shape[0]
        lse = torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device)
        target = torch.empty_like(lse)
        for rows in _chunks(hidden, weight):
            logits = (hidden[rows] @ weight.T).to(dtype)
            index, here = _local_labels(labels[rows], first, weight.shape[0])
            # Zero where another rank has the word: summed over ranks this is the label's logit.
            target[rows] = logits.gather(1, index[:, None]).squeeze(1) * here
            lse[rows] = logits.logsumexp(1)
        if tp_group.size() > 1:
            lse, target = _merge_vocabulary(lse, target, tp_group)
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.ignore_label, ctx.first = ignore_label, first
        return (lse - target).masked_fill(labels == ignore_label, 0.0)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, lse = ctx.saved_tensors
        dloss = dloss.masked_fill(labels == ctx.ignore_label, 0.0)
        dhidden = torch.empty_like(hidden)
        # Summed over chunks in fp32: in bf16 late chunks would be rounded away.
        dweight = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device)
        for rows in _chunks(hidden, weight):
            p = ((hidden[rows] @ weight.T).to(lse.dtype) - lse[rows, None]).exp_()
            index, here = _local_labels(labels[rows], ctx.first, weight.shape[0])
            # d loss / d logits = softmax - one-hot of the label, times the loss's own gradient.
            p.scatter_add_(1, index[:, None], -here[:, None].to(p.dtype))
            dlogits = p.mul_(dloss[rows, None]).to(hidden.dtype)
            dhidden[rows] = dlogits @ weight
            dweight += dlogits.T @ hidden[rows]
        return dhidden, dweight.to(weight.dtype), None, None, None


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, _CHUNK_ELEMENTS // weight.shape[0])
    return [slice(begin, begin + size) for begin in range(0, hidden.shape[0], size)]


def _local_labels(labels: Tensor, first: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Find the row of each label in this rank's part, and whether it is there at all: [t] int64, [t] bool.

    Example: labels [5, 2], rows from 4 on, 4 of them -> [1, 0], [True, False].
    """
    index = labels - first
    here = (index >= 0) & (index < num_rows)
    return index.clamp(0, num_rows - 1), here


def _merge_vocabulary(lse: Tensor, target: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Merge [T] log-sum-exps and label logits over tensor-parallel ranks; each label is on one rank only."""
    # log(sum_r e^lse_r) = peak + log(sum_r e^(lse_r - peak)), which cannot overflow.
    peak = lse.clone()
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack(((lse - peak).exp(), target))
    dist.all_reduce(sums, group=group)
    return peak + sums[0].log(), sums[1]
