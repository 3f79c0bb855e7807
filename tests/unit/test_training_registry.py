"""Every metric is declared once, completely, and docs/metrics.md says the same."""

from pathlib import Path

import pytest

from msa_train.training.metrics.document import document
from msa_train.training.metrics.metric import Chart, InSummary, Metric, Parts
from msa_train.training.metrics.registry import METRICS

ROOT = Path(__file__).parents[2]
REMEDY = "run: python -m msa_train.training.metrics.document > docs/metrics.md"


def test_the_document_is_that_of_the_registry() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == document(), REMEDY


def test_keys_and_tags_are_unique() -> None:
    keys = [metric.key for metric in METRICS]
    tags = [metric.tag for metric in METRICS if metric.tag]
    assert len(keys) == len(set(keys))
    assert len(tags) == len(set(tags))
    assert document().count("\n| `") == len(METRICS), "every metric is in a section"


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.key)
def test_a_declaration_fits_together(metric: Metric) -> None:
    has_parts = metric.parts not in (Parts.none, Parts.keys)
    assert ("@" in metric.tag) == has_parts
    assert metric.meaning
    assert not metric.meaning.endswith(".")
    assert bool(metric.title) == (metric.in_summary is InSummary.first_and_last)
    assert metric.tag or metric.chart is None
    if metric.part_of:
        whole = next(i for i, other in enumerate(METRICS) if other.key == metric.part_of)
        assert METRICS[whole].purpose
        assert whole < METRICS.index(metric), "it is added to what stands before"


def test_every_chart_has_a_metric() -> None:
    assert {metric.chart for metric in METRICS if metric.chart} == set(Chart)
