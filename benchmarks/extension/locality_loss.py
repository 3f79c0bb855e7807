"""Train with a loss that draws the queries of a rank towards the same remote blocks: a study, not an option.

    python -m benchmarks.extension.locality_loss run=extend_mini ... (as msa-train)

A pack is thought to lie on CP_SIZE ranks, and some queries of each are drawn. The index branch gives each of
them a distribution over the blocks before the rank. The loss is the mean divergence of these from their own
mean, the mutual information between query and block: 0 where all of them want the same. It reaches the index
branch alone. Selection and everything else are as they were.
"""

import os
import sys
from typing import Any

import torch
from torch import Tensor

from launchers.cli.help import help_text
from launchers.train import StartCommand, main
from msa_train.config import RunConfig
from msa_train.model.attention.index_branch import PendingIndexKeys
from msa_train.model.attention.msa import MsaSelfAttention
from msa_train.model.inputs.pack_params import PackContext
from msa_train.training.worker import run_worker

CP_SIZE = 16
QUERIES = 16
"drawn of each rank"
WEIGHT = "MSA_TRAIN_LOCALITY_WEIGHT"
"environment variable with the weight of the loss, relative to that of the KL loss"


def run_with_loss(config: RunConfig) -> bool:
    """Run as `run_worker` does, with the loss."""
    weight, own = float(os.environ[WEIGHT]), MsaSelfAttention.start

    def start(layer: MsaSelfAttention, hidden_states: Tensor, context: PackContext) -> PendingIndexKeys:
        index = own(layer, hidden_states, context)
        if torch.is_grad_enabled() and index.q.requires_grad:
            loss = mutual_information(index.q, index.k, layer.config.attention.block_size)
            # kl_weight holds the division by the queries of the whole step
            share = context.kl_weight * index.q.shape[0] * index.q.shape[1]
            index.q = _WithLoss.apply(index.q, weight * share * loss)
        return index

    setattr(MsaSelfAttention, "start", start)  # noqa: B010  a class has it as one of its methods
    return run_worker(config)


def mutual_information(q_index: Tensor, k_index: Tensor, block_size: int) -> Tensor:
    """Compute the loss of one pack, a scalar in nats: mean over ranks but the first, and over KV heads.

    q_index: [T, M, Di], k_index: [T, Di].
    Example: two queries of a rank that want two different blocks with certainty: ln 2.
    """
    num_tokens, shard = len(q_index), len(q_index) // CP_SIZE
    row = torch.arange(QUERIES) * shard // QUERIES
    terms: list[Tensor] = []
    for rank in range(1, CP_SIZE):
        # blocks that lie wholly before the rank
        before = rank * shard // block_size * block_size
        q, k = q_index[rank * shard + row], k_index[:before]
        logits = torch.einsum("nmd,td->nmt", q, k) * q.shape[-1] ** -0.5
        log_p = logits.unflatten(-1, (-1, block_size)).logsumexp(-1).log_softmax(-1)
        mean = log_p.exp().mean(0)
        terms.append((log_p.exp() * (log_p - mean.clamp_min(1e-30).log())).sum(-1).mean())
    assert num_tokens % CP_SIZE == 0, "packs divide"
    return torch.stack(terms).mean()


class _WithLoss(torch.autograd.Function):
    """Return the first argument; the second gets the gradient of a loss, 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.like)


if __name__ == "__main__":
    entry = "benchmarks.extension.locality_loss:run_with_loss"
    sys.exit(main(sys.argv[1:], StartCommand("locality_loss", entry, help_text)))
