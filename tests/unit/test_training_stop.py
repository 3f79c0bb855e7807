"""Signals that ask a run to stop, the mark it leaves, and who may write checkpoints."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launchers.local.run_dir import claim_run_dir
from msa_train.checkpoint.store import CheckpointStore
from msa_train.runtime import preemption
from msa_train.runtime.fencing import VARIABLE, SupersededError, check_not_superseded, claim

MARK = preemption.StopRecord(step=12, signal="SIGUSR1", saved=True, generation="7.0")


def test_mark_is_read_as_written_and_removed(tmp_path: Path) -> None:
    assert preemption.read_stopped(tmp_path) is None
    preemption.write_stopped(tmp_path, MARK)
    assert preemption.read_stopped(tmp_path) == MARK
    assert [path.name for path in tmp_path.iterdir()] == [preemption.STOPPED_NAME]
    preemption.clear_stopped(tmp_path)
    preemption.clear_stopped(tmp_path)
    assert preemption.read_stopped(tmp_path) is None


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_first_signal_is_noted_and_ends_nothing(number: signal.Signals) -> None:
    program = f"""
import os, signal
from msa_train.runtime import preemption
preemption.install_handlers()
assert preemption.signal_received() == 0
for number in ({int(number)}, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
    os.kill(os.getpid(), number)
print(preemption.signal_received())
preemption.ignore()
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == number


def test_later_start_takes_the_right_to_publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    claim(tmp_path, "7.0")
    check_not_superseded(tmp_path)
    store = CheckpointStore(tmp_path)
    folder = store.begin(1)
    for name in ("meta.json", "manifest.json"):
        (folder / name).write_text("{}")
    (tmp_path / ".generation").write_text("7.1\n")
    with pytest.raises(SupersededError, match=r"start 7.1 has taken over from start 7.0"):
        store.publish(1)
    with pytest.raises(SupersededError):
        store.begin(2)
    assert store.steps() == []
    assert folder.exists()


def test_requeued_start_takes_over_from_one_that_lives_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    preemption.write_stopped(tmp_path, MARK)
    with claim_run_dir(str(tmp_path)):
        assert preemption.read_stopped(tmp_path) is None
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        with claim_run_dir(str(tmp_path)):
            assert os.environ[VARIABLE] == "7.1"
            monkeypatch.setenv("SLURM_JOB_ID", "8")
            with pytest.raises(
                ValueError, match=rf"another msa-train \(pid {os.getpid()} on .*, start 7.1\)"
            ):
                claim_run_dir(str(tmp_path))
