"""Write docs/metrics.md, the reference of all metrics, from the registry.

    python -m msa_train.training.metrics.document > docs/metrics.md

A test compares the two.
"""

import sys
from collections.abc import Sequence

from msa_train.training.metrics import registry
from msa_train.training.metrics.metric import Chart, Metric, Parts
from msa_train.training.metrics.registry import METRICS

_HEAD = """\
# Metrics

What a line of `run_dir/metrics.jsonl` may hold, and where TensorBoard shows it. This page is made from
[the registry](../msa_train/training/metrics/registry.py) by `python -m msa_train.training.metrics.document`.

A line is one step, written every `logging.every` steps, of which rank 0 writes down what all ranks saw. A key
that does not apply is absent: the index branch's in a model without one, the exchange's with `cp_size=1`.
Layers count from 1 (`layer03`), KV groups from 0. For the `@` of a TensorBoard tag stands `layer03`,
`layer03_group1`, `layer03_distance4` or, by purpose, `kv`. Files of earlier versions have `f` for
`kv_selected_fraction_by_layer`.

*Over ranks* says how the ranks' numbers become one. A *ratio of sums* is a sum over ranks divided by a count
of all ranks, so that it does not depend on how many they are.
"""
_SECTIONS: tuple[tuple[str, str, Sequence[Metric]], ...] = (
    ("Of the line", "", registry.LINE),
    (
        "Losses",
        "The KL loss is divided by the real tokens of the whole batch; no layout or packing changes it.",
        registry.LOSSES,
    ),
    (
        "Optimizer",
        "With `train.bad_step=skip` or `rollback`, or a `train.spike_factor`, steps are judged before they "
        "are taken, and what became of them is counted here.",
        registry.OPTIMIZER,
    ),
    ("Speed and memory", "", registry.SPEED),
    ("Data", "Where the tokens come from, see [data](data.md); summary.json has their mean.", registry.DATA),
    (
        "Selection against full attention",
        "Every `logging.attention_every` steps, of sampled queries of the step's first pack that see more "
        "blocks than they select. `distance4` is 4 to 7 blocks before the query's own, and so on; null where "
        "none of the best blocks lies there.",
        registry.SELECTION,
    ),
    (
        "Exchange",
        "Bytes are those that all ranks received from others in the step. Queries that move "
        "(`index_query_bytes`, `full_query_bytes`) count with the block ids and outputs on their way home. "
        "`..._outer_bytes` is the part that crossed between machines and `..._hot_bytes` that of broadcast "
        "pairs, of what the key without `_outer` or `_hot` counts; absent where nothing went that way.",
        registry.EXCHANGE,
    ),
    ("Experts", "Real tokens only, of all ranks.", registry.EXPERTS),
    (
        "Checkpoints",
        "Of the checkpoint whose writing ended in this step; absent in other steps.",
        registry.CHECKPOINTS,
    ),
)


def document() -> str:
    """Make all of docs/metrics.md."""
    parts = [_HEAD]
    for title, text, metrics in _SECTIONS:
        parts.append(f"## {title}\n")
        if text:
            parts.append(f"{text}\n")
        parts.append(_table(metrics))
    parts += ["## Charts\n", "Of TensorBoard's Custom Scalars page.\n", _chart_table()]
    return "\n".join(parts)


def _table(metrics: Sequence[Metric]) -> str:
    """Make the table of some metrics, a row each."""
    lines = ["| key | meaning | unit | over ranks | tag |", "|---|---|---|---|---|"]
    for metric in metrics:
        tag = f"`{metric.tag}`" if metric.tag else ""
        key = f"`{metric.key}`"
        if metric.parts is not Parts.none:
            key += f": {metric.parts.value}"
        lines.append(f"| {key} | {metric.meaning} | {metric.unit} | {metric.over_ranks.value} | {tag} |")
    return "\n".join(lines) + "\n"


def _chart_table() -> str:
    """Make the table of the charts and the metrics that each shows."""
    lines = ["| page | chart | keys |", "|---|---|---|"]
    for chart in Chart:
        category, title = chart.value
        keys = ", ".join(f"`{metric.key}`" for metric in METRICS if metric.chart is chart)
        lines.append(f"| {category} | {title} | {keys} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(document())
