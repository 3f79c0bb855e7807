"""Runs of engine=deepspeed that are killed, also in a save, go on to the same bits; commands read them."""

import os
import random
from pathlib import Path

import pytest

from launchers.checkpoint import main as checkpoint_command
from launchers.train import main as train_command
from msa_train.training.metrics.writer import read_metrics
from tests.helpers import plain_aio
from tests.helpers.training_command import Training, last_step, train, without_times

STEPS = 10
BF16 = ("train.precision=bf16",)
ZERO = {
    "1": (*BF16, "deepspeed.zero_stage=1", "parallel.cp_size=2", "parallel.ep_size=2"),
    "3": (*BF16, "deepspeed.zero_stage=3", "parallel.cp_size=1", "parallel.ep_size=1"),
    # so large that weights and states of a rank are in files
    "nvme": (
        *BF16,
        "deepspeed=zero3_nvme",
        "parallel.cp_size=1",
        "parallel.ep_size=1",
        "model.hidden_size=256",
        "model.ffn_hidden_size=2048",
        "deepspeed.raw.zero_optimization.sub_group_size=300000",
    ),
}
# each place is a start of the command more
KILLED = {"1": ("step", "save"), "3": ("save",), "nvme": ("save",)}
NAMES = [
    "1",
    "3",
    pytest.param("nvme", marks=pytest.mark.skipif(not plain_aio.is_built(), reason=plain_aio.NOT_BUILT)),
]


def saves_again(checkpoints: Path) -> bool:
    """A save is under way, and an earlier one is there to go on from."""
    return any(checkpoints.glob(".step_*.partial")) and any(checkpoints.glob("step_*"))


@pytest.mark.parametrize("name", NAMES)
def test_killed_at_random_equals_left_alone(
    name: str,
    tiny: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seed = int(os.environ.get("TEST_SEED", random.randrange(2**32)))
    draw, repeat = random.Random(seed), f"repeat with TEST_SEED={seed}"
    settings = (
        *tiny,
        "engine=deepspeed",
        *ZERO[name],
        "deepspeed.reduce_bucket_size=20000",
        "deepspeed.allgather_bucket_size=20000",
        "deepspeed.param_persistence_threshold=100",
        "checkpoint.every=2",
        f"train.steps={STEPS}",
    )
    whole, cut, disk = tmp_path / "whole", tmp_path / "cut", tmp_path / "disk"
    disk.mkdir()
    if name == "nvme":
        settings = (*settings, f"deepspeed.nvme_path={disk}")
    train(*settings, f"run_dir={whole}")
    assert not list(disk.iterdir()), "files of a run that has ended"
    for place in KILLED[name]:
        with Training(*settings, f"run_dir={cut}") as training:
            training.wait_for_step(cut, (last_step(cut) or 0) + draw.randint(2, 3))
            if place == "save":
                training.wait_until(lambda: saves_again(cut / "checkpoints"), "a save after the first")
            if name == "nvme":
                assert len(list(disk.rglob("exp_avg-*.swp"))) >= 2, "each rank has moments in files"
                assert len(list(disk.rglob("*_param.tensor.swp"))) >= 2, "and weights"
            training.kill()
    assert last_step(cut) < STEPS, f"it had ended before it was killed; {repeat}"
    assert "going on from step " in train(*settings, f"run_dir={cut}"), repeat

    assert not list(disk.iterdir()), f"files of the run that was killed; {repeat}"
    want, got = read_metrics(whole), read_metrics(cut)
    assert list(map(without_times, got)) == list(map(without_times, want)), repeat
    assert checkpoint_command(["diff", str(whole), str(cut)]) == 0, repeat
    assert checkpoint_command(["verify", str(cut)]) == 0
    assert checkpoint_command(["ls", str(cut)]) == 0
    assert "deepspeed" in capsys.readouterr().out

    # another engine may go on with all of it, or begin with its weights
    for variable in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHDYNAMO_DISABLE"):
        monkeypatch.setenv(variable, os.environ.get(variable, ""))
    other = [*settings, f"run_dir={tmp_path / 'other'}", "engine=torch", f"checkpoint.load={cut}"]
    other.remove("engine=deepspeed")
    assert train_command([*other, f"train.steps={STEPS + 1}", "--check"]) == 0
    assert train_command([*other, "checkpoint.load_weights_only=true", "--check"]) == 0
