"""metrics.jsonl holds what the registry declares, in its form, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from msa_train.checkpoint.save import SaveReport
from msa_train.training.metrics.metric import Parts
from msa_train.training.metrics.registry import METRICS
from msa_train.training.metrics.writer import read_metrics
from tests.helpers.training_command import train
from tests.integration.conftest import FinishedRun

# four ranks on two nodes that fetch twice, and meet steps that are too bad to take
EVERYTHING = (
    "launcher.num_processes=4",
    "parallel.cp_size=4",
    "parallel.kv_exchange=selected",
    "exchange.ranks_per_node=2",
    "exchange.keep_for_backward=false",
    "train.steps=5",
    "train.bad_step=skip",
    "train.max_skipped=9",
    "train.spike_factor=1.001",
    "train.spike_window=2",
    "optim.lr=0.5",
    "checkpoint.every=2",
)
# `auto` in a run of its own: whether it goes by nodes depends on this machine's measured rates
CHOOSES = (
    "launcher.num_processes=2",
    "parallel.cp_size=2",
    "parallel.kv_exchange=auto",
    "train.steps=1",
)
# of runs on more ranks than a test has, or of numbers that other tests spoil
NOT_HERE = {
    "kv_hot_bytes",
    "kv_again_hot_bytes",
    "kv_grad_hot_bytes",
    "heads_bytes",
    "heads_grad_bytes",
    "nonfinite",
}
BY_KEY = {metric.key: metric for metric in METRICS}


@pytest.fixture(scope="module")
def rows(finished: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Lines of a plain run, of one with everything and of one that chooses its exchange."""
    folder = tmp_path_factory.mktemp("declared")
    found = read_metrics(finished.run_dir)
    # a mixture of one source, whose documents were made
    records = [{"text": f"text {i} " * 60, "provenance": {"made_by": "chapters"}} for i in range(20)]
    corpus = folder / "made.jsonl"
    corpus.write_text("".join(json.dumps(record) + "\n" for record in records))
    mixes = (*CHOOSES, f"data.mixture.made.corpus={corpus}")
    for name, settings in {"everything": EVERYTHING, "chooses": mixes}.items():
        train(*finished.settings, *settings, f"run_dir={folder / name}")
        found += read_metrics(folder / name)
    return found


def test_runs_log_what_is_declared(rows: list[dict[str, Any]]) -> None:
    failed = SaveReport(step=1, pause_s=0.1, error="no space").metrics()
    logged = {key for row in rows for key in row} | set(failed)
    assert logged - set(BY_KEY) == set(), "declare these in registry.py"
    assert set(BY_KEY) - logged == NOT_HERE, "no run logs what is declared"


def test_values_have_the_declared_form(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for key, value in row.items():
            declared = BY_KEY[key].parts
            # both are plain names with numbers
            wanted = Parts.purposes if declared is Parts.shares else declared
            assert form_of(value) == wanted, key


def form_of(value: Any) -> Parts:
    """Tell what a value is made of."""
    if not isinstance(value, dict):
        return Parts.none
    if not value or not all(name.startswith("layer") for name in value):
        return Parts.purposes
    (kind,) = {type(entry) for entry in value.values()}
    return {float: Parts.layers, list: Parts.groups, dict: Parts.distances}[kind]


def test_old_key_is_not_written(finished: FinishedRun) -> None:
    text = (Path(finished.run_dir) / "metrics.jsonl").read_text()
    assert '"f": ' not in text
    assert '"kv_selected_fraction_by_layer": ' in text
