"""The packs of one optimizer step on one data-parallel rank, and their forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from msa_train.data import IGNORE_LABEL, Pack
from msa_train.parallel.comm.fault_watch import watched
from msa_train.parallel.process_groups import Groups


@dataclass(slots=True)
class StepBatch:
    """The packs of one optimizer step; counts are over all data-parallel ranks."""

    packs: Sequence[Pack]
    "of this data-parallel rank"
    num_labels: int
    "tokens with a label, the divisor of the language-model loss"
    num_tokens: int
    "real tokens, the divisor of the KL loss"
    num_packs: int
    recall_seed: int | None = None
    "seed of the queries whose recall is measured in the step's first pack; None: of none"
    has_first: bool = True
    "the step's first pack is among `packs`"

    def recall_seed_of(self, pack: Pack) -> int | None:
        """The seed, for the first pack of the step: the same queries however packs are dealt."""
        return self.recall_seed if self.has_first and pack is self.packs[0] else None


def make_batch(packs: Sequence[Pack], groups: Groups, *, recall_seed: int | None = None) -> StepBatch:
    """Count over all data-parallel ranks, so that no divisor depends on how packs are dealt."""
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
    )
