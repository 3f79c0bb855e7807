"""A disk that fills up: the run ends with the cause, keeps what it has, and goes on when there is space."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from msa_train.training.checkpoint_store import CheckpointStore
from msa_train.training.metrics import read_metrics
from tests.helpers.training_command import ROOT, RUN_WITHIN_S, Training, last_step, without_times
from tests.integration.conftest import STEPS, FinishedRun

# room for the first checkpoint of about a megabyte, not for the second
TOO_SMALL, ENOUGH = "size=3m", "size=30m"


def mount(folder: Path, options: str) -> subprocess.CompletedProcess[str]:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """Its checkpoints lie on a small disk."""
    disk = tmp_path / "run" / "checkpoints"
    disk.mkdir(parents=True)
    mounted = mount(disk, TOO_SMALL)
    if mounted.returncode:
        pytest.skip(f"no disk may be mounted here: {mounted.stderr.strip()}")
    yield tmp_path / "run"
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_run_keeps_its_checkpoint_and_goes_on_when_there_is_space(
    finished: FinishedRun, run_dir: Path
) -> None:
    start = (*finished.settings, f"run_dir={run_dir}", f"train.steps={STEPS}")
    store = CheckpointStore(run_dir)
    with Training(*start) as training:
        assert training.end() == 1
        assert "checkpoint of step 8 could not be saved: rank 0: OSError: it needs 0.002" in training.errors
        assert "the checkpoint of step 4 stays; free some space" in training.errors
    assert store.steps() == [4]
    assert store.verify(4) is None
    assert mount(store.folder, f"remount,{ENOUGH}").returncode == 0
    with Training(*start) as training:
        assert training.end() == 0, training.errors
        assert "going on from step 4" in training.output
    want, got = read_metrics(finished.run_dir), read_metrics(run_dir)
    for ours, theirs in zip(got, want, strict=True):
        assert without_times(ours) == without_times(theirs), f"step {theirs['step']}"


@pytest.mark.parametrize("more", [("logging.progress=bar",), ("logging.progress=lines",)])
def test_output_into_a_file_on_a_full_disk_ends_nothing(
    finished: FinishedRun, tmp_path: Path, more: tuple[str, ...]
) -> None:
    settings = (*finished.settings, f"run_dir={tmp_path / 'run'}", "train.steps=4", *more)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "launchers.train", *settings],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "CUDA_VISIBLE_DEVICES": ""},
            stdout=full,
            stderr=full,
            timeout=RUN_WITHIN_S,
        )
    assert done.returncode == 0
    assert last_step(tmp_path / "run") == 4
    assert CheckpointStore(tmp_path / "run").steps() == [4]
