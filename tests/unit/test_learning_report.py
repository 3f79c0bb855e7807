"""The report of the learning benchmark: what counts as finished, paired comparison, tables."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.learning.report import read_runs, summary, write_report
from benchmarks.learning.run_all import is_finished


def row(step: int, *, text: float, accuracy: float, layers: dict[str, Any]) -> dict[str, Any]:
    buckets = [{"from": 0, "below": 128, "queries": 4, "accuracy": accuracy}]
    return {
        "step": step, "tokens": step * 10, "cpu_s": 60.0, "text_loss": text, "lookup_loss": 1.0,
        "accuracy": accuracy, "by_distance": buckets, "layers": layers,
    }  # fmt: skip


def selection(recall: float) -> dict[str, Any]:
    names = [
        f"{n}_{p}" for n in ("block_recall", "score_recall", "best_score_recall") for p in ("text", "query")
    ]
    return {"1": dict.fromkeys(names, recall) | {"f": {str(cp): [0.2, 0.4] for cp in (2, 4, 8, 16)}}}


def write_run(folder: Path, variant: str, seed: int, rows: list[dict[str, Any]], steps: int = 20) -> Path:
    path = folder / f"{variant}_{seed}.jsonl"
    head = {"variant": variant, "seed": seed, "steps": steps}
    path.write_text("\n".join(json.dumps(line) for line in (head, *rows)) + "\n")
    return path


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for seed, text in ((1, 2.0), (2, 3.0)):
        write_run(tmp_path, "full", seed, [row(20, text=text, accuracy=0.8, layers={})])
        rows = [row(step, text=text * 1.01, accuracy=0.4, layers=selection(0.5)) for step in (10, 20)]
        write_run(tmp_path, "msa", seed, rows)
    # Cut off before its end, as by an interruption.
    write_run(tmp_path, "msa_no_kl", 1, [row(10, text=1.0, accuracy=1.0, layers={})])
    return tmp_path


def test_only_finished_runs_count(runs: Path) -> None:
    found = read_runs(runs)
    assert {variant: sorted(by_seed) for variant, by_seed in found.items()} == {"full": [1, 2], "msa": [1, 2]}
    assert is_finished(runs / "msa_1.jsonl", 20)
    assert not is_finished(runs / "msa_1.jsonl", 30)
    assert not is_finished(runs / "msa_no_kl_1.jsonl", 20)
    assert not is_finished(runs / "swa_1.jsonl", 20)


def test_variants_are_compared_seed_by_seed(runs: Path) -> None:
    found = summary(read_runs(runs))
    assert found["msa"]["text_loss_over_full"] == {1: pytest.approx(0.01), 2: pytest.approx(0.01)}
    assert found["msa"]["accuracy_over_full"] == {1: pytest.approx(0.5), 2: pytest.approx(0.5)}


def test_report_holds_tables_figures_and_plots(runs: Path, tmp_path: Path) -> None:
    text = write_report(runs, tmp_path / "results")
    assert "| msa | 2 | 2.5250 (2.0200 to 3.0300) | +1.00% (+1.00% to +1.00%) | 0.400" in text
    assert f"| msa | 1 | {'0.500 / 0.500 | ' * 3}{', '.join(['0.20/0.40'] * 4)} |" in text
    content = json.loads((tmp_path / "results" / "learning.json").read_text())
    assert content["final"]["msa"]["seeds"] == [1, 2]
    plots = sorted(path.name for path in (tmp_path / "results").glob("*.png"))
    assert plots == [f"learning_{name}.png" for name in ("accuracy", "f", "recall", "text")]


def test_nothing_to_report_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no finished run"):
        write_report(tmp_path, tmp_path)
