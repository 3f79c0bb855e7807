"""The learning benchmark's single run, a few steps of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("variant", ["swa", "msa"])
def test_a_short_run_writes_its_measurements(tmp_path: Path, variant: str) -> None:
    command = [sys.executable, "-m", "benchmarks.learning.run_one", "--variant", variant, "--steps", "20"]
    command += ["--stop", "5", "--every", "2", "--packs", "1", "--final-packs", "1", "--out", str(tmp_path)]
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (tmp_path / f"{variant}_1.jsonl").read_text().splitlines()]
    assert lines[0] | {"variant": variant, "seed": 1, "steps": 20} == lines[0]
    assert lines[0]["commit"]
    rows = lines[1:]
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert rows[-1]["text_loss"] < rows[0]["text_loss"]
    assert sum(bucket["queries"] for bucket in rows[-1]["by_distance"]) == 96
    if variant == "swa":
        assert rows[-1]["layers"] == rows[-1]["kl"] == {}
        return
    # The dense warm-up of 3 of 20 steps selects nothing.
    assert [row["stage"] for row in rows] == ["dense_warmup", "sparse", "sparse"]
    assert rows[0]["layers"] == {}
    assert set(rows[-1]["layers"]) == set(rows[-1]["kl"]) == {"1", "2"}
    for layer in rows[-1]["layers"].values():
        assert 0 < layer["block_recall_text"] <= 1
        assert layer["score_recall_query"] <= layer["best_score_recall_query"] + 1e-6
        assert all(len(groups) == 2 for groups in layer["f"].values())
