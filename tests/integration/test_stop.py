"""A run in slices: asked to stop, it saves and ends; started again, it comes to the same bits."""

import signal
from pathlib import Path

from launchers.cli.command_line import STOPPED
from msa_train.checkpoint.store import CheckpointStore
from msa_train.runtime import preemption
from msa_train.training.metrics.writer import read_metrics
from tests.helpers.training_command import Training, last_step, without_times
from tests.integration.conftest import STEPS, FinishedRun

TO_THE_END = f"train.steps={STEPS}"


def test_chain_of_slices_equals_one_long_run(finished: FinishedRun, tmp_path: Path) -> None:
    """StopRecord twice, the second time with more signals of both kinds while it saves."""
    run_dir = tmp_path / "run"
    start = (*finished.settings, f"run_dir={run_dir}", TO_THE_END, "checkpoint.every=100")

    with Training(*start, program=True) as training:
        training.wait_for_step(run_dir, 2)
        training.process.send_signal(signal.SIGUSR1)
        assert training.end() == STOPPED, training.output + training.errors
        first = _stopped(run_dir, "SIGUSR1")
        assert f"stopped by SIGUSR1 after step {first}: another start goes on from here" in training.output
        assert training.errors == ""

    with Training(*start, program=True) as training:
        training.wait_for_step(run_dir, first + 3)
        training.process.send_signal(signal.SIGTERM)
        training.wait_until(lambda: list((run_dir / "checkpoints").glob(".step_*.partial")), "a save")
        for process in training.processes():
            process.send_signal(signal.SIGUSR1)
            process.send_signal(signal.SIGTERM)
        assert training.end() == STOPPED, training.output + training.errors
        second = _stopped(run_dir, "SIGTERM")

    with Training(*start) as training:
        assert training.end() == 0, training.output + training.errors
    assert preemption.read_stopped(run_dir) is None
    assert 2 <= first < second < STEPS
    want, got = read_metrics(finished.run_dir), read_metrics(run_dir)
    assert [row["step"] for row in got] == list(range(1, STEPS + 1))
    for ours, theirs in zip(got, want, strict=True):
        assert without_times(ours) == without_times(theirs), f"step {theirs['step']}"


def test_nothing_to_go_on_from_is_no_pause(finished: FinishedRun, tmp_path: Path) -> None:
    start = (*finished.settings, f"run_dir={tmp_path / 'run'}", TO_THE_END, "checkpoint.every=0")
    with Training(*start) as training:
        training.wait_for_step(tmp_path / "run", 1)
        training.process.send_signal(signal.SIGTERM)
        assert training.end() == 128 + signal.SIGTERM
        assert training.errors == "msa-train: stopped by SIGTERM\n"
    assert last_step(tmp_path / "run") < STEPS


def test_hang_is_ended_with_the_stacks_of_who_waits(finished: FinishedRun, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    start = (*finished.settings, f"run_dir={run_dir}", "train.steps=100000", "watchdog.timeout_s=20")
    with Training(*start) as training:
        training.wait_for_step(run_dir, 1)
        training.worker(1).send_signal(signal.SIGSTOP)
        assert training.end() == 1, training.output
        assert "rank 0: no progress for 2" in training.errors
        assert "(watchdog.timeout_s=20)" in training.errors
        # where rank 0 stands: in training, wherever that waits for rank 1 at that moment
        assert "msa_train/training/trainer.py" in training.errors
        headline = next(line for line in training.errors.splitlines() if "of 2 failed" in line)
        assert "rank 0 of 2 failed: StalledError: rank 0: no progress for 2" in headline
        # it is not the one to blame, and says so
        assert ", waiting for other ranks with " in headline


def _stopped(run_dir: Path, name: str) -> int:
    """The step at which it stopped and that is saved."""
    mark = preemption.read_stopped(run_dir)
    assert mark is not None
    assert (mark.signal, mark.saved) == (name, True)
    assert CheckpointStore(run_dir).steps()[-1] == mark.step == last_step(run_dir)
    return mark.step
