"""Make metrics of the comparison of MSA's selection with full attention."""

from typing import Any

from torch import Tensor

from msa_train.parallel.attention.selection_recall import RecallSums


def attention_metrics(flat: Tensor, layers: list[int]) -> dict[str, Any]:
    """Compute recall and entropy from sums over all sampled queries.

    Args:
        flat: [layers, KV heads, 3 + 4 NK] fp64, `RecallSums.flat` added up over ranks; NK distances.
        layers: numbers of the MSA layers.

    Returns:
        Means over layers and groups, values by layer and group, and by layer and distance in blocks
        ("distance4" is 4 to 7 blocks before the query's own), None where no top block lay at that distance;
        nothing if no query was sampled.
    """
    sums = RecallSums.from_flat(flat)
    if not sums.count.any():
        return {}
    values: dict[str, Any] = {}
    for name, total, count in (
        ("block_recall", sums.hit_count.sum(-1), sums.best_count.sum(-1)),
        ("score_recall", sums.score, sums.count),
        ("score_recall_best", sums.best_mass.sum(-1), sums.count),
        ("attention_entropy", sums.entropy, sums.count),
    ):
        # Sums divided by sums: a mean of the ranks' ratios would weigh ranks with few queries like others.
        ratio = total / count
        values[name] = float(ratio.mean())
        values[f"{name}_by_layer"] = {
            f"layer{layer:02d}": groups for layer, groups in zip(layers, ratio.tolist(), strict=True)
        }
    for name, total, whole in (
        ("block_recall_by_distance", sums.hit_count.sum(1), sums.best_count.sum(1)),
        ("score_recall_by_distance", sums.hit_mass.sum(1), sums.best_mass.sum(1)),
    ):
        values[name] = {
            f"layer{layer:02d}": _by_distance(row, of)
            for layer, row, of in zip(layers, total.tolist(), whole.tolist(), strict=True)
        }
    return values


def _by_distance(part: list[float], whole: list[float]) -> dict[str, float | None]:
    """Divide by distance; bucket b > 0 holds distances 2^(b-1) to 2^b - 1.

    Example: [1, 1, 0], [2, 1, 0] -> {"distance0": 0.5, "distance1": 1.0, "distance2": None}.
    """
    return {
        f"distance{2 ** (bucket - 1) if bucket else 0}": a / b if b else None
        for bucket, (a, b) in enumerate(zip(part, whole, strict=True))
    }
