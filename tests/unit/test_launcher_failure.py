"""What is told about a worker that could leave no traceback."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from launchers.local import failure_report as failure
from launchers.local.failure_report import WorkerFailure, report
from msa_train.runtime.last_words import LAUNCHER_PID, record


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = WorkerFailure(
        rank=0, pid=1, exit_code=1, time_s=1.0, error="", traceback="", ended_by_launcher=False, log=None
    )
    text = report({0: first}, world_size=1, log_folder=tmp_path)
    assert text.endswith("it left no traceback")
    full = SimpleNamespace(f_bavail=0, f_frsize=4096, f_files=10, f_favail=10)
    monkeypatch.setattr(failure.os, "statvfs", lambda _: full)
    text = report({0: first}, world_size=1, log_folder=tmp_path)
    assert text.endswith(f"it left no traceback; the disk of {tmp_path} is full")
    assert report({0: first}, world_size=1).endswith("it left no traceback")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_traceback_that_cannot_be_recorded_goes_to_the_terminal(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv(LAUNCHER_PID, str(os.getpid()))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "missing" / "rank.json"))
    record(ValueError("the cause"))
    assert "ValueError: the cause" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "rank.json"))
    record(ValueError("the cause"))
    assert "the cause" in (tmp_path / "rank.json").read_text()
    # the launcher tells that of rank 0
    assert ("the cause" in capsys.readouterr().err) == (rank != "0")
