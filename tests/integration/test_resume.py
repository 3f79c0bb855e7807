"""Kills, restarts and other layouts: what a run computes does not depend on them."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from unittest.mock import ANY

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launchers.hydra_config.compose import compose_run
from launchers.local.launch_checks import check_files
from launchers.train import main
from msa_train.training.metrics.writer import read_metrics
from tests.helpers.training_command import DOWN_WITHIN_S, Training, last_step, train, wait_gone, without_times
from tests.integration.conftest import STEPS, FinishedRun

LOSSES = ("lm_loss", "kl_loss", "grad_norm", "val_loss")
TO_THE_END = f"train.steps={STEPS}"

LOADED_STEP, CONTINUED_STEPS = 12, 5
ONE_PROCESS = ("launcher.num_processes=1", "parallel.cp_size=1", "parallel.ep_size=1")
LAYOUTS = {
    "cp1-dp2-ep1": ("parallel.cp_size=1", "parallel.ep_size=1"),
    "cp1-dp2-ep2": ("parallel.cp_size=1", "parallel.ep_size=2"),
    "cp4-ep2": ("launcher.num_processes=4", "parallel.cp_size=4", "parallel.ep_size=2"),
}
FP32_ROUNDING = 1e-6
# rounding decides between blocks of nearly the same score, which shows in the KL loss, hardly in the others
AFTER_OTHER_SELECTIONS = {"lm_loss": 1e-6, "val_loss": 1e-6, "grad_norm": 1e-5, "kl_loss": 1e-4}


def test_killed_again_and_again_equals_left_alone(finished: FinishedRun, tmp_path: Path) -> None:
    """Made longer, killed at random steps and in a checkpoint, newest checkpoint damaged: the same bits."""
    seed = int(os.environ.get("TEST_SEED", random.randrange(2**32)))
    draw, run_dir = random.Random(seed), tmp_path / "run"
    repeat = f"repeat with TEST_SEED={seed}"
    start = (*finished.settings, f"run_dir={run_dir}", "logging.tensorboard=true")

    train(*start, "train.steps=3", "train.validate_every=0")
    with Training(*start, TO_THE_END) as training:
        training.wait_for_step(run_dir, 3 + draw.randint(1, 4))
        _kill_a_worker(training)
    with Training(*start, TO_THE_END) as training:
        training.wait_for_step(run_dir, last_step(run_dir) + draw.randint(1, 3))
        training.kill()
    assert last_step(run_dir) < STEPS, f"it had ended before it was killed; {repeat}"
    with Training(*start, TO_THE_END) as training:
        earlier, seen = _partial_checkpoints(run_dir), last_step(run_dir)
        training.wait_until(lambda: last_step(run_dir) != seen, "a step")
        processes = training.processes()
        training.wait_until(lambda: _partial_checkpoints(run_dir) - earlier, "a checkpoint being written")
        training.kill(processes)
    assert _partial_checkpoints(run_dir), f"the checkpoint was finished before the kill; {repeat}"
    before, newest = sorted((run_dir / "checkpoints").glob("step_*"))[-2:]
    _flip_a_bit(newest / "__0_0.distcp")
    output = train(*start, TO_THE_END)

    damage = f"{_short(newest)} is damaged (model file __0_0.distcp: checksum) and is skipped"
    assert f"checkpoint {damage}; going on from {_short(before).replace('_', ' ')}\n" in output, repeat
    want = read_metrics(finished.run_dir)
    got = read_metrics(run_dir)
    assert [row["step"] for row in got] == list(range(1, STEPS + 1)), repeat
    for ours, theirs in zip(got, want, strict=True):
        assert without_times(ours) == without_times(theirs), f"step {theirs['step']}; {repeat}"
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("loss/lm")] == list(range(1, STEPS + 1)), repeat
    assert not _partial_checkpoints(run_dir)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_layout_goes_on_with_the_same_losses(
    finished: FinishedRun, tmp_path: Path, layout: str
) -> None:
    output = train(
        *finished.settings,
        f"run_dir={tmp_path / 'run'}",
        f"checkpoint.load={finished.run_dir}/checkpoints/step_{LOADED_STEP:08d}",
        f"train.steps={LOADED_STEP + CONTINUED_STEPS}",
        *LAYOUTS[layout],
    )
    assert f"going on from step {LOADED_STEP} of {finished.run_dir}" in output
    _compare_losses(finished.run_dir, tmp_path / "run", first_step=LOADED_STEP + 1)


def test_run_dir_goes_on_in_one_process(finished: FinishedRun, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished.run_dir, run_dir)
    for step in (16, STEPS):
        shutil.rmtree(run_dir / "checkpoints" / f"step_{step:08d}")
    output = train(
        *finished.settings,
        f"run_dir={run_dir}",
        f"train.steps={LOADED_STEP + CONTINUED_STEPS}",
        *ONE_PROCESS,
    )
    assert f"going on from step {LOADED_STEP}\n" in output
    _compare_losses(finished.run_dir, run_dir, first_step=1)
    (earlier,) = run_dir.glob("config.2*.yaml")
    assert "cp_size: 2" in earlier.read_text()


def test_finished_run_has_nothing_to_do(finished: FinishedRun, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished.run_dir, run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    output = train(*finished.settings, f"run_dir={run_dir}", "train.steps=7", *ONE_PROCESS)
    assert f"nothing to do: train.steps=7 and {STEPS} are made" in output
    assert read_metrics(run_dir) == read_metrics(finished.run_dir)
    summary |= {"seconds_this_start": ANY, "world_size": 1, "cp_size": 1, "ep_size": 1}
    assert json.loads((run_dir / "summary.json").read_text()) == summary


def test_check_refuses_what_the_workers_would(
    finished: FinishedRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A KL loss that is switched off takes the optimizer's state of the index branch away."""
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHDYNAMO_DISABLE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    settings = [*finished.settings, f"run_dir={finished.run_dir}", f"train.steps={STEPS + 1}"]
    assert main([*settings, "attention.kl_weight=0", "--check"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("msa-train: error: attention.kl_weight=0: the checkpoint in ")
    assert error.count("\n") == 1
    # frozen in a way that keeps the state, or without the state
    assert main([*settings, "optim.index_lr_scale=0", "--check"]) == 0
    from_weights = [f"checkpoint.load={finished.run_dir}", "checkpoint.load_weights_only=true"]
    own = [f"run_dir={finished.run_dir.parent / 'other'}", "attention.kl_weight=0"]
    assert main([*settings, *own, *from_weights, "--check"]) == 0


def test_checkpoints_know_their_data(finished: FinishedRun, tmp_path: Path) -> None:
    """Another order is refused, of a run's own checkpoint and of another's; the record has what was read."""
    folder = max((finished.run_dir / "checkpoints").glob("step_*"))
    record = json.loads((folder / "meta.json").read_text())["data"]
    assert (record["num_documents"], record["since_step"], record["before"]) == (60, 0, [])
    assert json.loads((finished.run_dir / "data.json").read_text())["record"] == record
    own = (f"run_dir={finished.run_dir}",)
    for start in (own, (f"run_dir={tmp_path}", f"checkpoint.load={finished.run_dir}")):
        settings = (*finished.settings, *start, TO_THE_END)
        check_files(compose_run(settings), say=lambda _: None)
        with pytest.raises(ValueError, match=r"^data.seed=7: .*; use data.seed=1234, or checkpoint.accept_"):
            check_files(compose_run([*settings, "data.seed=7"]), say=lambda _: None)


def _kill_a_worker(training: Training) -> None:
    """SIGKILL for rank 1: the job is down within the promised time, and says why."""
    processes, killed = training.processes(), training.worker(1)
    killed.send_signal(signal.SIGKILL)
    begin = time.monotonic()
    assert training.end() == 1
    assert time.monotonic() - begin < DOWN_WITHIN_S
    wait_gone(processes)
    # rank 0 may have written before it, on the same terminal
    _, found, report = training.errors.partition("msa-train: rank 1 of 2 failed: ended by SIGKILL")
    assert found, training.errors
    assert f"pid {killed.pid}, " in report
    assert "\n  afterwards rank 0: " in report


def _compare_losses(want_dir: Path, got_dir: Path, *, first_step: int) -> None:
    want = {row["step"]: row for row in read_metrics(want_dir)}
    got = read_metrics(got_dir)
    assert [row["step"] for row in got] == list(range(first_step, LOADED_STEP + CONTINUED_STEPS + 1))
    for row in got:
        step, theirs = row["step"], want[row["step"]]
        for name in LOSSES:
            # the last step of a run is always validated
            if name not in row or (name == "val_loss" and name not in theirs):
                continue
            tolerance = FP32_ROUNDING if step == LOADED_STEP + 1 else AFTER_OTHER_SELECTIONS[name]
            assert row[name] == pytest.approx(theirs[name], rel=tolerance), f"{name} of step {step}"


def _partial_checkpoints(run_dir: Path) -> set[tuple[str, int]]:
    """Checkpoints being written, or left by a kill; each write is told from earlier ones by its time."""
    found = set()
    for path in (run_dir / "checkpoints").glob(".step_*.partial"):
        try:
            found.add((path.name, path.stat().st_ctime_ns))
        except FileNotFoundError:
            # published in the meantime
            continue
    return found


def _short(checkpoint: Path) -> str:
    return f"step_{int(checkpoint.name.removeprefix('step_'))}"


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
