"""Runs of engine=deepspeed that are killed, also in a save, go on to the same bits; commands read them."""

import os
import random
from pathlib import Path

import pytest

from launchers.checkpoint import main as checkpoint_command
from launchers.train import main as train_command
from msa_train.training.metrics.writer import read_metrics
from tests.helpers.training_command import Training, last_step, train, without_times

STEPS = 10
ZERO = {
    1: ("train.precision=bf16", "parallel.cp_size=2", "parallel.ep_size=2"),
    3: ("train.precision=bf16", "parallel.cp_size=1", "parallel.ep_size=1"),
}
# each place is a start of the command more
KILLED = {1: ("step", "save"), 3: ("save",)}


def saves_again(checkpoints: Path) -> bool:
    """A save is under way, and an earlier one is there to go on from."""
    return any(checkpoints.glob(".step_*.partial")) and any(checkpoints.glob("step_*"))


@pytest.mark.parametrize("stage", ZERO)
def test_killed_at_random_equals_left_alone(
    stage: int,
    tiny: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seed = int(os.environ.get("TEST_SEED", random.randrange(2**32)))
    draw, repeat = random.Random(seed), f"repeat with TEST_SEED={seed}"
    settings = (
        *tiny,
        *ZERO[stage],
        "engine=deepspeed",
        f"deepspeed.zero_stage={stage}",
        "deepspeed.reduce_bucket_size=20000",
        "deepspeed.allgather_bucket_size=20000",
        "deepspeed.param_persistence_threshold=100",
        "checkpoint.every=2",
        f"train.steps={STEPS}",
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(*settings, f"run_dir={whole}")
    for place in KILLED[stage]:
        with Training(*settings, f"run_dir={cut}") as training:
            training.wait_for_step(cut, (last_step(cut) or 0) + draw.randint(2, 3))
            if place == "save":
                training.wait_until(lambda: saves_again(cut / "checkpoints"), "a save after the first")
            training.kill()
    assert last_step(cut) < STEPS, f"it had ended before it was killed; {repeat}"
    assert "going on from step " in train(*settings, f"run_dir={cut}"), repeat

    want, got = read_metrics(whole), read_metrics(cut)
    assert list(map(without_times, got)) == list(map(without_times, want)), repeat
    assert checkpoint_command(["diff", str(whole), str(cut)]) == 0, repeat
    assert checkpoint_command(["verify", str(cut)]) == 0
    assert checkpoint_command(["ls", str(cut)]) == 0
    assert "deepspeed" in capsys.readouterr().out

    # another engine may go on with all of it, or begin with its weights
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHDYNAMO_DISABLE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    other = [*settings, f"run_dir={tmp_path / 'other'}", "engine=torch", f"checkpoint.load={cut}"]
    assert train_command([*other, f"train.steps={STEPS + 1}", "--check"]) == 0
    assert train_command([*other, "checkpoint.load_weights_only=true", "--check"]) == 0
