"""Make the rows of evaluation.jsonl: a figure with everything that tells what it is of.

Every row repeats what identifies it, for rows of several checkpoints, wordings and lengths end up in one
file: mode, task, length, seed, samples, step, stage, rotary embedding, top-k, checkpoint, digest of the
model's settings, code, tokenizer, wording and word lists. Some 1.5 KB for each task and length.
"""

from collections.abc import Sequence
from typing import Any

from msa_train.config import RunConfig, Stage
from msa_train.evaluation.intervals import wilson
from msa_train.evaluation.scoring.held_out import ContextLoss
from msa_train.evaluation.scoring.samples import MODE, SampleScore
from msa_train.evaluation.tasks.sample import Sample

Row = dict[str, Any]


def identity(config: RunConfig, stage: Stage) -> Row:
    """Say what follows from the settings alone."""
    settings = config.evaluation
    return {
        "mode": MODE,
        "seed": settings.seed,
        "depths": settings.depths,
        "stage": stage.name,
        "rope": stage.rope.record(),
        "attention": stage.attention.value,
        "topk": stage.topk,
        "block_size": config.attention.block_size,
    }


def task_row(
    samples: Sequence[Sample],
    scores: Sequence[SampleScore],
    rates: dict[str, list[float]] | None,
    num_depths: int,
) -> Row:
    """Sum up the samples of a task and length.

    Args:
        samples: of one task and length, at least one.
        scores: of these samples.
        rates: share of (query, needle) pairs that were selected, by layer and KV head; None: not measured.
        num_depths: that needles were put at.
    """
    first, count = samples[0], len(samples)
    tokens = sum(score.num_tokens for score in scores)
    accuracy = sum(score.num_correct / score.num_tokens for score in scores) / count
    row: Row = {
        "kind": "task",
        "task": first.task,
        "length": first.length,
        "samples": count,
        "tokens": sum(len(sample.tokens) for sample in samples) / count,
        "answer_tokens": tokens / count,
        # the mean over samples, whose tokens are not independent: so the interval counts samples
        "token_accuracy": accuracy,
        "token_accuracy_interval": wilson(accuracy * count, count),
        "nll": sum(score.nll for score in scores) / count,
        "nll_per_token": sum(score.nll for score in scores) / tokens,
    }
    if first.ordered:
        hits = [score.is_hit for score in scores]
        row |= {
            "hits": sum(hits),
            "hit_rate": sum(hits) / count,
            "hit_interval": wilson(sum(hits), count),
        }
        depths = [depth_bin(sample.depth, num_depths) for sample in samples]
        if None not in depths:
            row["by_depth"] = by_depth([depth or 0.0 for depth in depths], hits)
    if rates:
        shares = [share for layer in rates.values() for share in layer]
        row["needle_rate"] = rates
        row["needle_rate_mean"] = sum(shares) / len(shares)
        row["needle_rate_best"] = max(shares)
    return row


def depth_bin(depth: float | None, num_depths: int) -> float | None:
    """Return the nearest of the even depths. Example: 0.48 of 5 -> 0.5."""
    if depth is None or num_depths == 1:
        return depth if depth is None else 0.5
    return round(depth * (num_depths - 1)) / (num_depths - 1)


def by_depth(depths: Sequence[float], hits: Sequence[bool]) -> dict[str, list[int]]:
    """Count hits and samples by depth: {"0.50": [hits, samples]}, ascending."""
    counts: dict[str, list[int]] = {}
    for depth, hit in sorted(zip(depths, hits, strict=True)):
        count = counts.setdefault(f"{depth:.2f}", [0, 0])
        count[0] += hit
        count[1] += 1
    return counts


def position_row(bins: dict[int, tuple[int, float]], length: int, documents: int) -> Row:
    """Make the row of losses by position: {"8": [tokens, nats]} holds tokens 256 to 511."""
    losses = {str(number): [count, loss] for number, (count, loss) in bins.items()}
    return {"kind": "position_loss", "length": length, "documents": documents, "loss_by_log2": losses}


def context_row(losses: Sequence[ContextLoss], length: int, last_tokens: int) -> Row:
    """Make the row of gains from context, by tokens of context."""
    return {
        "kind": "context_gain",
        "length": length,
        "last_tokens": last_tokens,
        "contexts": {
            str(one.context): {
                "documents": one.documents,
                "loss": one.loss,
                "gain": one.gain,
                # JSON has no infinity
                "gain_interval": None
                if one.documents < 2
                else [one.gain - one.half_interval, one.gain + one.half_interval],
            }
            for one in losses
        },
    }
