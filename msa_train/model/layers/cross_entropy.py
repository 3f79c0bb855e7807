"""Compute the language-model loss in tiles: the [tokens, vocabulary] logits never exist whole.

At a million tokens on 64 ranks and 200K words they would take 13 GB in fp32, on 256 ranks 3.3 GB, and as much
again for their gradient. The vocabulary may be cut over tensor-parallel ranks.

A tile is up to 8,192 tokens by as many words as fit 256 MiB of fp32. Tiles that share their words follow one
another, so the gradient of these words is complete after them: it is rounded to the weight's dtype and
written in its place, and no fp32 copy of the whole [V, H] gradient exists. With up to 8,192 tokens on a rank
it is one product. What is summed over all words is the gradient of the hidden states, in fp32.

By arithmetic for 256 ranks in 4 stages, 1M tokens, H = 6,144, V = 200,064: T = 16,384, so 2 x 25 tiles.
Beside logits (256 MiB) and their gradient (128) there are 192 MiB for a slice of the weight's gradient and
384 MiB for the hidden states'; fp32 dW and its temporaries were 6.9 GiB. Products: one forward, three
backward.

Shapes: T local tokens, H hidden size, V words of this rank; t tokens and v words of a tile.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from msa_train.model.layers.fusion import fused
from msa_train.model.layers.wide_products import add_product, wide_product

# fp32 logits of a tile: 256 MiB
_TILE_ELEMENTS = 2**26
# Wide enough for products at full speed: 1,024 rows are; more save partial sums of the weight's gradient.
_TILE_ROWS = 8192


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_label: int,
    tp_group: dist.ProcessGroup,
    *,
    is_fused: bool = False,
) -> Tensor:
    """Compute the cross-entropy of softmax(hidden @ weight.T) at each label.

    Args:
        hidden: [T, H]; with tensor parallelism the same on all ranks of the group.
        weight: [V, H] this rank's rows of the output embedding, V = vocabulary / tp_size.
        labels: [T] int64 word ids, `ignore_label` where there is none.
        ignore_label: negative id whose tokens get loss 0.
        tp_group: tensor-parallel group.
        is_fused: softmax and its gradient are compiled, one pass over the logits each.

    Returns:
        [T] loss in nats, fp32 (fp64 for fp64 inputs). The gradient of `hidden` is this rank's part; the
        caller sums it over the group (Megatron's gather or copy does).
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, ignore_label, tp_group, is_fused)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ignore_label: int,
        tp_group: dist.ProcessGroup,
        is_fused: bool,
    ) -> Tensor:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        first = tp_group.rank() * weight.shape[0]
        target = torch.zeros(hidden.shape[0], dtype=dtype, device=hidden.device)
        slices = list(_word_slices(hidden, weight))
        # one row for each slice of words, merged at once: each merge of two would round again
        parts = target.new_empty(len(slices), hidden.shape[0])
        for number, words in enumerate(slices):
            for rows in _row_slices(hidden):
                logits = wide_product(hidden[rows], weight[words].T, dtype)
                index, here = _local_labels(labels[rows], first + words.start, words.stop - words.start)
                # Zero where another tile or rank has the word: their sum is the label's logit.
                target[rows] += logits.gather(1, index[:, None]).squeeze(1) * here
                parts[number, rows] = (_fused_logsumexp if is_fused else torch.logsumexp)(logits, 1)
        lse = parts.logsumexp(0) if len(slices) > 1 else parts[0]
        if tp_group.size() > 1:
            lse, target = _merge_vocabulary(lse, target, tp_group)
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.ignore_label, ctx.first, ctx.is_fused = ignore_label, first, is_fused
        return (lse - target).masked_fill(labels == ignore_label, 0.0)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, lse = ctx.saved_tensors
        dloss = dloss.masked_fill(labels == ctx.ignore_label, 0.0)
        slices, chunks = list(_word_slices(hidden, weight)), list(_row_slices(hidden))
        # Sums of several tiles are in fp32: in bf16 late ones would be rounded away. One alone needs none.
        hidden_sum = _Sum(torch.empty_like(hidden), lse.dtype, len(slices))
        # none for a weight that a stage freezes
        dweight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for words in slices:
            word_sum = None if dweight is None else _Sum(dweight[words], lse.dtype, len(chunks))
            for rows in chunks:
                logits = wide_product(hidden[rows], weight[words].T, lse.dtype)
                index, here = _local_labels(labels[rows], ctx.first + words.start, words.stop - words.start)
                place = index, here
                dlogits = _logits_grad(logits, lse[rows], dloss[rows], *place, hidden.dtype, ctx.is_fused)
                hidden_sum.add(rows, dlogits, weight[words])
                if word_sum is not None:
                    word_sum.add(slice(None), dlogits.T, hidden[rows])
            if word_sum is not None:
                word_sum.finish()
        return hidden_sum.finish(), dweight, None, None, None, None


class _Sum:
    """Add up products in fp32 and round once; a single product is written where it belongs."""

    def __init__(self, result: Tensor, dtype: torch.dtype, count: int) -> None:
        """Take the [n, H] `result`, the `dtype` of sums and how many products each row of it gets."""
        self.result = result
        is_own_sum = count == 1 or result.dtype == dtype
        self.total = result if is_own_sum else torch.empty(result.shape, dtype=dtype, device=result.device)
        self.is_single = count == 1
        if not self.is_single:
            self.total.zero_()

    def add(self, rows: slice, left: Tensor, right: Tensor) -> None:
        """Add left [n, k] @ right [k, H] to these rows."""
        if self.is_single:
            torch.mm(left, right, out=self.result[rows])
        else:
            add_product(self.total[rows], left, right)

    def finish(self) -> Tensor:
        """Round the sum into the result, and return that."""
        return self.result if self.total is self.result else self.result.copy_(self.total)


def _logits_grad(
    logits: Tensor,
    lse: Tensor,
    dloss: Tensor,
    index: Tensor,
    here: Tensor,
    dtype: torch.dtype,
    is_fused: bool,
) -> Tensor:
    """Form d loss / d logits = (softmax - one-hot of the label) * dloss: [t, v] in `dtype`; spoils `logits`.

    lse, dloss: [t]; index, here: [t] from `_local_labels`.
    """
    # Taken before: of a likely word 1 - p would be all rounding error if p had 8 bits.
    label = logits.gather(1, index[:, None])
    label = ((label - lse[:, None]).exp_() - here[:, None].to(lse.dtype)) * dloss[:, None]
    if is_fused:
        dlogits = _fused_softmax_grad(logits, lse, dloss, dtype)
    else:
        dlogits = logits.sub_(lse[:, None]).exp_().mul_(dloss[:, None]).to(dtype)
    # Each row has one place, so nothing is added up in an order that could vary.
    return dlogits.scatter_(1, index[:, None], label.to(dtype))


@fused
def _fused_logsumexp(logits: Tensor, dim: int) -> Tensor:
    return logits.logsumexp(dim)


@fused
def _fused_softmax_grad(logits: Tensor, lse: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    return ((logits - lse[:, None]).exp() * dloss[:, None]).to(dtype)


def _row_slices(hidden: Tensor) -> Iterator[slice]:
    """Cut the tokens: slices of up to `_TILE_ROWS`.

    Example: 10,000 tokens -> 0..8,192 and 8,192..10,000.
    """
    for begin in range(0, hidden.shape[0], _TILE_ROWS):
        yield slice(begin, min(begin + _TILE_ROWS, hidden.shape[0]))


def _word_slices(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Cut the words so that a tile of them fits.

    Example: 4,096 tokens and 200,064 words -> 13 slices of 16,384 words, the last one of 3,456.
    """
    size = max(1, _TILE_ELEMENTS // max(1, min(hidden.shape[0], _TILE_ROWS)))
    for begin in range(0, weight.shape[0], size):
        yield slice(begin, min(begin + size, weight.shape[0]))


def _local_labels(labels: Tensor, first: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Find the row of each label in this part of the words, and whether it is there: [t] int64, [t] bool.

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
