"""Count the packs of one optimizer step over all ranks: the divisors of its losses.

A loss is a sum over tokens divided by the number of tokens of the whole step. Each rank divides its own sum
by that global number before the backward pass; then gradients are plain sums over ranks and packs.

Example: ranks with 3 and 1 labels, losses 3 x 1.0 and 1 x 5.0. Both divide by 4: 0.75 + 1.25 = 2.0, the mean
over all labels. A mean of the ranks' means would be (1.0 + 5.0) / 2 = 3.0, and depend on how packs are dealt.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from msa_train.data import IGNORE_LABEL, Pack
from msa_train.parallel.comm.fault_watch import watched
from msa_train.parallel.process_groups import Groups


@dataclass(slots=True)
class StepBatch:
    """Hold the packs of one optimizer step; counts are over all data-parallel ranks."""

    packs: Sequence[Pack]
    "of this data-parallel rank"
    num_labels: int
    "tokens with a label, the divisor of the language-model loss"
    num_tokens: int
    "real tokens, the divisor of the KL loss"
    num_packs: int
    "packs of the step"
    recall_seed: int | None = None
    "seed of the queries whose recall is measured in the step's first pack; None: of none"
    has_first: bool = True
    "the step's first pack is among `packs`"
    with_kl_value: bool = True
    "the step's metrics tell the KL loss; its gradient is formed anyway"

    def recall_seed_of(self, pack: Pack) -> int | None:
        """Return the seed for the first pack of the step: the same queries however packs are dealt."""
        return self.recall_seed if self.has_first and pack is self.packs[0] else None


def make_batch(
    packs: Sequence[Pack], groups: Groups, *, recall_seed: int | None = None, with_kl_value: bool = True
) -> StepBatch:
    """Make the batch of a step, with counts over all data-parallel ranks. All ranks call it.

    Packs are whole here, on each of the context-parallel ranks that share them, so the sum goes over
    data-parallel ranks alone: one all-reduce of 3 int64.

    Args:
        packs: of this data-parallel rank, none at all included.
        groups: process groups.
        recall_seed: draws the queries whose recall is measured; None: none.
        with_kl_value: the step's metrics are to tell the KL loss.
    """
    labels = sum(int((pack.labels != IGNORE_LABEL).sum()) for pack in packs)
    tokens = sum(int(pack.doc_lengths.sum()) for pack in packs)
    counts = torch.tensor([labels, tokens, len(packs)], dtype=torch.int64, device=groups.device)
    with watched("step_counts"):
        dist.all_reduce(counts, group=groups.dp)
    num_labels, num_tokens, num_packs = counts.tolist()
    # A step without any label is a step all the same, as it is to Megatron: gradients of the loss are zero,
    # the KL loss has its own, moments and weight decay go on. Left out, it would shift the schedule by one.
    return StepBatch(
        packs=packs,
        num_labels=max(num_labels, 1),
        num_tokens=max(num_tokens, 1),
        num_packs=num_packs,
        recall_seed=recall_seed,
        has_first=groups.dp_rank == 0,
        with_kl_value=with_kl_value,
    )
