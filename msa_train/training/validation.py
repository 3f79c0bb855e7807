"""Compute the loss of held-out documents between steps."""

import math

import torch
import torch.distributed as dist

from msa_train.data import Corpus, PackedDataset
from msa_train.data.mixture.packs import MixedPacks
from msa_train.parallel.comm.fault_watch import watched
from msa_train.training.engines.engine import TrainEngine


def validate(engine: TrainEngine, dataset: PackedDataset | MixedPacks, corpus: Corpus) -> dict[str, float]:
    """Compute the mean loss, nats per token, of the same held-out packs each time. All ranks call it.

    Attention is that of the engine's stage.

    Example: 5 packs on 2 data-parallel ranks: (0, 1), (2, 3), (4, 4), of which the last counts nothing.

    Args:
        engine: of the run.
        dataset: held-out packs of the stage's length.
        corpus: tells the bytes that a token stands for.

    Returns:
        "val_loss" and, where the corpus is text, "val_bits_per_byte".
    """
    groups = engine.groups
    dp_rank, dp_size = groups.dp_rank, groups.dp_size
    count = min(engine.config.train.validation_packs, dataset.num_packs)
    # Every rank runs the same number of packs: collectives must pair up. Surplus packs count nothing.
    rounds = -(-count // dp_size)
    packs = [dataset[min(i * dp_size + dp_rank, count - 1)] for i in range(rounds)]
    labels = sum(dataset[i].num_labels for i in range(count))
    total = 0.0
    for i, pack in enumerate(packs):
        with watched("validation"):
            loss_sum = engine.evaluate([pack])
        if i * dp_size + dp_rank < count and engine.counts_loss():
            total += loss_sum
    loss = torch.tensor(total, dtype=torch.float64, device=groups.device)
    with watched("validation"):
        dist.all_reduce(loss)
    values = {"val_loss": float(loss) / max(labels, 1)}
    if corpus.bytes_per_token:
        # nats / ln 2 are bits
        values["val_bits_per_byte"] = values["val_loss"] / math.log(2.0) / corpus.bytes_per_token
    return values
