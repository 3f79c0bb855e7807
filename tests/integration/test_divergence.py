"""A run that diverges ends at once, says so, and leaves only finite checkpoints."""

import json
from pathlib import Path

import pytest

from msa_train.checkpoint.store import CheckpointStore
from msa_train.checkpoint.torch_dist.finite_state import DivergedError
from msa_train.training.stability.finite_check import check_finite
from tests.helpers.training_command import Training
from tests.integration.test_resume import ONE_PROCESS


def test_a_diverging_run_ends(tiny: tuple[str, ...], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    wild = ("optim.lr=1e30", "optim.warmup_steps=0", "checkpoint.every=1", "train.steps=6", *ONE_PROCESS)
    with Training(*tiny, *wild, f"run_dir={run_dir}") as training:
        assert training.end() == 1
        (line,) = [x for x in training.errors.splitlines() if x.startswith("msa-train: rank 0")]
    rows = [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]
    bad = rows[-1]["step"]
    assert "grad_norm" in rows[-1]["nonfinite"]
    assert not any("nonfinite" in row for row in rows[:-1])
    assert f"DivergedError: step {bad}: grad_norm=nan: not finite" in line
    assert f"the newest checkpoint is of step {bad - 1}; " in line
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names[-1] == f"step_{bad - 1:08d}"


def test_what_is_watched(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    check_finite(3, {"lm_loss": 1.0, "grad_norm": 2.0}, store)
    with pytest.raises(DivergedError, match=r"^step 3: val_loss=inf: not finite; .*no checkpoint yet; "):
        check_finite(3, {"lm_loss": 1.0, "val_loss": float("inf")}, store)
