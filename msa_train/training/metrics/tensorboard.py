"""Split the figures of a step into TensorBoard's points, and lay out its charts."""

from collections.abc import Iterator, Mapping
from typing import Any

from msa_train.training.metrics.metric import Chart, Metric, Parts
from msa_train.training.metrics.registry import METRICS

_TAGS = {metric.key: metric.tag for metric in METRICS if metric.tag}


def _pattern(metric: Metric) -> str:
    """Make the regular expression that the tags of a metric match."""
    index = ".*" if metric.parts in (Parts.purposes, Parts.shares) else "layer.*"
    return metric.tag.replace("@", index) + "$"


def _charts() -> dict[str, dict[str, list[Any]]]:
    """Lay out the charts as the Custom Scalars page takes them: by category and title."""
    charts: dict[str, dict[str, list[Any]]] = {}
    for chart in Chart:
        category, title = chart.value
        patterns = [_pattern(metric) for metric in METRICS if metric.chart is chart]
        charts.setdefault(category, {})[title] = ["Multiline", patterns]
    return charts


CHARTS = _charts()


def scalars(key: str, value: Any) -> Iterator[tuple[str, float]]:
    """Yield TensorBoard tags and numbers of one value.

    Example: kv_selected_fraction_by_layer={"layer03": [0.1, 0.2]} -> exchange/f_layer03_group0 0.1 and
    exchange/f_layer03_group1 0.2. block_recall_by_distance={"layer03": {"distance4": 0.5}} ->
    attention_distance/block_recall_layer03_distance4 0.5.
    """
    entries = value.items() if isinstance(value, Mapping) else [("", value)]
    for name, entry in entries:
        if isinstance(entry, list | tuple):
            numbers = [(f"{name}_group{group}", number) for group, number in enumerate(entry)]
        elif isinstance(entry, Mapping):
            numbers = [(f"{name}_{part}", number) for part, number in entry.items()]
        else:
            numbers = [(name, entry)]
        for index, number in numbers:
            if number is not None and not isinstance(number, str):
                yield _tag(key, index), float(number)


def _tag(key: str, index: str) -> str:
    """Make the tag of a number: kl_loss_by_layer, layer03 -> loss/kl_layer03."""
    # an undeclared key ends no run, a test finds it
    return _TAGS.get(key, f"other/{key}_@" if index else f"other/{key}").replace("@", index)
