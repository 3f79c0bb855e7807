"""Checkpoints and folders that cannot be used: one line on stderr, exit code 2, no worker started."""

import shutil
from pathlib import Path

from tests.helpers.training_command import Training
from tests.integration.conftest import FinishedRun


def refuse(*arguments: str) -> str:
    """The one line that the command says."""
    with Training(*arguments) as training:
        assert training.end() == 2, training.output + training.errors
        assert training.errors.startswith("msa-train: error: ")
        assert training.errors.count("\n") == 1, training.errors
        return training.errors


def test_every_checkpoint_is_damaged(finished: FinishedRun, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    checkpoints = run_dir / "checkpoints"
    for step in (4, 8):
        name = f"step_{step:08d}"
        shutil.copytree(finished.run_dir / "checkpoints" / name, checkpoints / name)
    (checkpoints / "step_00000004" / "__1_0.distcp").unlink()
    with (checkpoints / "step_00000008" / "__0_0.distcp").open("r+b") as file:
        file.truncate(1000)
    line = refuse(*finished.settings, f"run_dir={run_dir}")
    assert f"run_dir={run_dir}: every checkpoint is damaged" in line
    assert "step_00000008: model file __0_0.distcp: 1000 bytes instead of" in line
    assert "step_00000004: model file __1_0.distcp: missing" in line
    assert f"remove {checkpoints} to start anew, or use another run_dir" in line
    assert not (run_dir / "logs").exists()

    line = refuse(*finished.settings, f"run_dir={tmp_path / 'new'}", f"checkpoint.load={run_dir}")
    assert f"checkpoint.load={run_dir}: every checkpoint is damaged" in line
    assert "use another checkpoint.load" in line
    assert not (tmp_path / "new" / "logs").exists()


def test_checkpoint_of_another_model(finished: FinishedRun, tmp_path: Path) -> None:
    arguments = (f"run_dir={tmp_path / 'new'}", f"checkpoint.load={finished.run_dir}")
    line = refuse(*finished.settings, *arguments, "model.num_experts=8")
    assert "model.num_experts=8: checkpoint " in line
    assert "is of another model, with model.num_experts=4; set model.num_experts=4, or use" in line
    assert not (tmp_path / "new" / "logs").exists()


def test_load_leads_nowhere(tiny: tuple[str, ...], tmp_path: Path) -> None:
    line = refuse(*tiny, f"run_dir={tmp_path / 'run'}", f"checkpoint.load={tmp_path / 'gone'}", "--check")
    assert f"checkpoint.load={tmp_path / 'gone'}: does not exist; use the run_dir of a run" in line


def test_run_dir_that_even_root_cannot_write(tiny: tuple[str, ...]) -> None:
    line = refuse(*tiny, "run_dir=/proc/msa-train/run")
    assert "run_dir=/proc/msa-train/run: cannot be written" in line
    assert "use a folder that you may write to" in line
