"""The demo with fewer steps: a new user's first run."""

from pathlib import Path

from msa_train.training.metrics.writer import read_metrics
from tests.helpers.training_command import train


def test_demo_trains_reports_and_goes_on(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = ("run=demo", f"run_dir={run_dir}", f"data.cache_dir={tmp_path / 'cache'}")
    output = train(*settings, "train.steps=3", "train.validation_packs=2", program=True)

    assert "demo: 2 processes on the CPU = dp 1 x cp 2 x tp 1 x pp 1, ep 2; engine torch" in output
    assert "steps 1 to 3 of 1 x 8192 tokens" in output
    assert "step 3/3  lm_loss" in output
    assert "checkpoint step 3 written in" in output
    table = dict(_columns(line) for line in output.rpartition("\n\n")[2].splitlines())
    assert table["steps"] == "3 (24.6K tokens)"
    first, last = map(float, table["training loss (nats)"].split(" -> "))
    assert last < first
    assert "KL loss of the index branch" in table
    assert {"validation loss (nats)", "validation bits per byte", "speed"} <= set(table)
    assert table["all-gather or ring would move"].endswith("of it moved)")
    assert float(table["f, share of remote blocks selected"].split()[0]) <= 1
    assert table["watch it"] == f"tensorboard --logdir {run_dir}/tensorboard"
    assert table["train on"] == "the same command with train.steps=6"  # within the warm-up
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "tensorboard", "logs"):
        assert (run_dir / name).exists()
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["latest", "step_00000003"]

    output = train(*settings, "train.steps=4", "train.validate_every=0")
    assert "going on from step 3\n" in output
    rows = read_metrics(run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert ["val_loss" in row for row in rows] == [False, False, True, False]
    assert rows[3]["lm_loss"] < rows[0]["lm_loss"]


def _columns(line: str) -> tuple[str, str]:
    name, _, value = line.strip().partition("  ")
    return name, value.strip()
