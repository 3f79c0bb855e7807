"""A rank whose disk hangs while it saves is named first, with the point, soon after watchdog.timeout_s."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launchers.compose import compose_run
from launchers.run_dir import claim_run_dir, write_config
from tests.helpers.training_command import ROOT, RUN_WITHIN_S, last_step
from tests.integration.conftest import FinishedRun

TIMEOUT_S, SPARE_S = 8, 10


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_the_rank_that_hangs_is_named(finished: FinishedRun, tmp_path: Path, asynchronous: str) -> None:
    run_dir = tmp_path / "run"
    more = ("checkpoint.every=2", f"checkpoint.asynchronous={asynchronous}")
    settings = (
        *finished.settings,
        f"run_dir={run_dir}",
        "train.steps=100",
        f"watchdog.timeout_s={TIMEOUT_S}",
    )
    config = compose_run([*settings, *more])
    claim_run_dir(config.run_dir).close()
    entry = ("tests.helpers.launcher_start", str(write_config(config)), "2", "tests.helpers.hanging_disk:run")
    process = subprocess.Popen(
        [sys.executable, "-m", *entry],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        # with the second save on its way, or in the first one, no step is made any more
        until = 4 if asynchronous == "true" else 2
        while last_step(run_dir) < until:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        begin = time.monotonic()
        _, errors = process.communicate(timeout=RUN_WITHIN_S)
        took_s = time.monotonic() - begin
    finally:
        process.kill()
    assert process.returncode == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("msa-train: rank 1 of 2 failed: ")]
    point = r"no progress for \d+ s since .*, writing the checkpoint of step 2 \(watchdog.timeout_s=8\)"
    assert re.search(f"rank 1: {point}", line)
    assert TIMEOUT_S - 1 < took_s < TIMEOUT_S + SPARE_S, took_s
    (log,) = run_dir.glob("logs/*/rank1.err")
    assert "in _hang" in log.read_text()
