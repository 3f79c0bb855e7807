"""The command as users start it: bad files get one line, and a run that torchrun starts joins its job."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECK_WITHIN_S = 120
RUN_WITHIN_S = 300


def msa_train(
    *arguments: str, launcher: tuple[str, ...] = (), timeout: float = CHECK_WITHIN_S
) -> subprocess.CompletedProcess[str]:
    """Run the command on the CPU, alone or under another launcher."""
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, "-m", "launchers.train", "run=smoke", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def settings(tmp_path: Path) -> tuple[str, ...]:
    """A small corpus of text, a run_dir, and a cache of the test's own."""
    (tmp_path / "corpus").mkdir()
    for number in range(40):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"document {number} says {number} words\n" * 100)
    return (
        f"run_dir={tmp_path / 'run'}",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"data.corpus={tmp_path / 'corpus'}",
    )


def refused(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("msa-train: error: ")
    return result.stderr


def test_missing_corpus(settings: tuple[str, ...], tmp_path: Path) -> None:
    line = refused(msa_train(*settings, f"data.corpus={tmp_path}/nowhere.txt"))
    assert f"data.corpus={tmp_path}/nowhere.txt" in line
    assert not (tmp_path / "run" / "logs").exists()


def test_empty_corpus(settings: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    assert f"data.corpus={tmp_path}/empty.txt" in refused(
        msa_train(*settings, f"data.corpus={tmp_path}/empty.txt")
    )


def test_tokenizer_larger_than_the_vocabulary(settings: tuple[str, ...]) -> None:
    line = refused(msa_train(*settings, "model.vocab_size=100", "--check"))
    assert "model.vocab_size=100" in line


def test_check_prints_the_layout_and_leaves_no_run_dir(settings: tuple[str, ...], tmp_path: Path) -> None:
    result = msa_train(*settings, "--check")
    assert result.returncode == 0, result.stderr
    assert "smoke: 2 processes on the CPU = dp 1 x cp 2 x tp 1 x pp 1, ep 2; engine torch" in result.stdout
    assert not (tmp_path / "run").exists()


def test_trains_resumes_and_refuses_another_model(settings: tuple[str, ...], tmp_path: Path) -> None:
    result = msa_train(*settings, "train.steps=2", timeout=RUN_WITHIN_S)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "run" / "config.yaml").exists()
    line = refused(msa_train(*settings, "train.steps=4", "model.hidden_size=96"))
    assert "hidden_size" in line
    result = msa_train(*settings, "train.steps=4", timeout=RUN_WITHIN_S)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "going on from step 2" in result.stdout


def test_joins_the_job_of_torchrun(settings: tuple[str, ...], tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    # the number of processes is torchrun's here
    result = msa_train(
        *settings, "train.steps=2", "launcher.num_processes=7", launcher=torchrun, timeout=RUN_WITHIN_S
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("smoke: 2 processes on the CPU") == 1
    assert not (tmp_path / "run" / "logs").exists()
