"""Look at what the head makes of labelled tokens alone: their losses and the words that it holds likeliest.

Of a pack of 1M tokens an evaluation labels some tens. Their hidden states are taken out before the product
with the vocabulary, so neither [T, V] logits exist nor are they computed: 30 answers of 200,064 words take
23 MiB of fp32 logits on the rank that holds them. With tensor parallelism two all-reduces of 8 bytes per
labelled token merge the parts of the vocabulary, besides those of the loss.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from msa_train.data import IGNORE_LABEL
from msa_train.model.layers.cross_entropy import linear_cross_entropy
from msa_train.model.layers.wide_products import wide_product

# fp32 logits of a tile: 256 MiB
_TILE_ELEMENTS = 2**26


@dataclass(slots=True)
class HeadRecord:
    """Hold what was seen of one pack on this rank; n labelled tokens, on the host."""

    rows: Tensor
    "[n] int64 their rows among this rank's tokens, ascending"
    losses: Tensor
    "[n] nats"
    predicted: Tensor | None
    "[n] int64 likeliest word, the lowest of equal ones; None: not asked for"


class HeadObserver:
    """Take the place of the loss in MsaGptModel while it is set there; without gradients."""

    def __init__(self, *, predicts: bool) -> None:
        """Start without records; predicts: find the likeliest words too, a second product."""
        self.predicts = predicts
        self.records: list[HeadRecord] = []
        "one for each pack, in their order"

    def losses(self, hidden: Tensor, weight: Tensor, labels: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
        """Compute the loss of each token that has a label, and note it.

        Args:
            hidden: [T, H]; with tensor parallelism the same on all ranks of the group.
            weight: [V, H] this rank's rows of the output embedding.
            labels: [T] int64, IGNORE_LABEL where there is none.
            tp_group: tensor-parallel group.

        Returns:
            [T] loss in nats, 0 where there is no label.
        """
        assert not torch.is_grad_enabled(), "for evaluations"
        rows = (labels != IGNORE_LABEL).nonzero().squeeze(1)
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        result = torch.zeros(len(labels), dtype=dtype, device=hidden.device)
        if not len(rows):
            nothing = torch.zeros(0, dtype=torch.int64)
            self.records.append(HeadRecord(nothing, result[:0].cpu(), nothing if self.predicts else None))
            return result
        chosen = hidden[rows]
        result[rows] = linear_cross_entropy(chosen, weight, labels[rows], IGNORE_LABEL, tp_group)
        predicted = likeliest_words(chosen, weight, tp_group).cpu() if self.predicts else None
        self.records.append(HeadRecord(rows.cpu(), result[rows].cpu(), predicted))
        return result


def likeliest_words(hidden: Tensor, weight: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    """Find the word with the highest logit, over all parts of the vocabulary; the lowest id of equal ones.

    Args:
        hidden: [n, H].
        weight: [V, H] this rank's rows.
        tp_group: tensor-parallel group.

    Returns:
        [n] int64.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    best = torch.full((len(hidden),), -torch.inf, dtype=dtype, device=hidden.device)
    words = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
    first, size = tp_group.rank() * len(weight), max(1, _TILE_ELEMENTS // max(len(hidden), 1))
    for begin in range(0, len(weight), size):
        logits = wide_product(hidden, weight[begin : begin + size].T, dtype)
        # the first of equal ones
        index = logits.argmax(1)
        value = logits.gather(1, index[:, None]).squeeze(1)
        higher = value > best
        best, words = torch.where(higher, value, best), torch.where(higher, index + begin + first, words)
    if tp_group.size() > 1:
        peak = best.clone()
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=tp_group)
        # ranks that do not have the best word name one that nobody has
        words = torch.where(best == peak, words, torch.iinfo(torch.int64).max)
        dist.all_reduce(words, op=dist.ReduceOp.MIN, group=tp_group)
    return words
