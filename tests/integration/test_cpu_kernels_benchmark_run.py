"""The CPU benchmark, a small run of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cpu_kernels.run import main

ROOT = Path(__file__).resolve().parents[2]


def test_small_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.cpu_kernels.run", "--out", str(tmp_path), "--threads", "1"]
    command += ["--lengths", "512", "--memory-lengths", "4096", "--rounds", "1", "--head-dim", "8"]
    command += ["--tries", "1", "--wait-s", "0"]
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "cpu_kernels.json").read_text())
    assert 0 < result["worst_row"] < 2e-5
    (row,) = result["times"]
    assert row["ratio"] == pytest.approx(row["dense_16_s"] / row["msa_s"])
    (row,) = result["memory"]
    assert row["peak_bytes"] > row["process_bytes"] > 2**20
    text = (tmp_path / "cpu_kernels.md").read_text()
    assert text == done.stdout[done.stdout.index("# MSA on the CPU") :].removesuffix("\n")
    assert "| 512 | 1 |" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lengths", "100"], "length 100: must be a multiple of the block size, 128"),
        (["--rounds", "0"], "--rounds=0"),
        (["--head-dim", "7"], "--head-dim=7"),
    ],
)
def test_bad_command_lines(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
