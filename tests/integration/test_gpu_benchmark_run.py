"""The GPU benchmark's command, tiny: children killed at random, an abort, signals; in the interpreter."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu.records import Records
from tests.helpers.pretended_gpu.build import build, needs_pretended_gpu
from tests.helpers.triton_env import needs_triton

ROOT = Path(__file__).parents[2]
SMALL = ["--smoke", "--seed", "3"]
OPERATORS = {"scoring", "sparse forward", "sparse backward + KL", "prefill", "training step"}
DECODE = {"decode", "decode, fp8 index keys"}
TOPK = {"selection against torch.topk", "selection of 16 queries against torch.topk"}


def start(
    folder: Path, *arguments: str, prefix: tuple[str, ...] = (), **variables: str
) -> subprocess.Popen[str]:
    """The command itself, from another folder."""
    program = [sys.executable, str(ROOT / "benchmarks/gpu/run_all.py"), "--out", str(folder / "out")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(
        [*prefix, *program, *SMALL, *arguments], cwd=ROOT if prefix else folder, env=environment | variables,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out/gpu.json").read_text())


def check_files(folder: Path) -> None:
    """All of it is there."""
    found = content(folder)
    assert found["correct"], [check for check in found["checks"] if not check["error"] <= check["allowed"]]
    assert found["missing"] == []
    rows = {(row["what"], row["selection"]) for row in found["rows"]}
    plain = {(what, selection) for what, selection in rows if ", as shipped" not in what}
    assert {what for what, _ in plain} >= OPERATORS | DECODE | TOPK
    assert {what for what, selection in rows if selection == "correlated"} == OPERATORS
    for row in found["rows"]:
        assert row["ours_s"] > 0
        assert row["share_of_roofline"] is not None or row["what"] not in OPERATORS | DECODE
        assert row["ratio"] is not None or row["what"] not in {"prefill", "training step"} | DECODE | TOPK
    assert set(found["rates"]) == {"before", "after"}
    assert {goal["verdict"] for goal in found["goals"]} == {"not measured"}
    names = [check["name"] for check in found["checks"]]
    assert len(names) == len(set(names)) == 83
    assert "| prefill | 64 | independent |" in (folder / "out/gpu.md").read_text()


def test_killed_aborted_stopped_and_called_again(tmp_path: Path) -> None:
    """What is lost is what was under way; the next call makes it."""
    cpu = ("--device", "cpu", "--kernel", "cpu")
    run = start(tmp_path, *cpu, MSA_BENCHMARK_ABORT="ours-64/sparse forward")
    draw, kills, until = random.Random(5), 0, time.monotonic() + 200
    records = Records(tmp_path / "out")
    while time.monotonic() < until and not _has_row(records, "decode"):
        time.sleep(draw.uniform(0.5, 2.0))
        children = psutil.Process(run.pid).children()
        if kills < 3 and children:
            draw.choice(children).kill()
            kills += 1
    run.terminate()
    text, _ = run.communicate(timeout=30)
    assert run.returncode in (1, 3), text
    assert _has_row(records, "decode")
    found = content(tmp_path)
    crashed = [said for said in found["missing"] if ": crashed: " in said]
    assert any(said.startswith("ours-64, sparse forward: crashed: ended by SIGABRT") for said in crashed)
    assert len(crashed) <= 1 + kills
    assert any("ended by SIGTERM" in note for note in found["notes"])
    assert _no_child_lives(tmp_path)
    before = [record for record in records.read() if record["kind"] == "row"]
    again = start(tmp_path, *cpu)
    text, _ = again.communicate(timeout=120)
    assert again.returncode == 0, text
    check_files(tmp_path)
    # what was there was not made again
    assert [record for record in records.read() if record["kind"] == "row"][: len(before)] == before
    assert sum(row["what"] == "scoring" and row["selection"] == "independent" for row in _rows(records)) == 1


def _rows(records: Records) -> list[dict[str, Any]]:
    return [record for record in records.read() if record["kind"] == "row"]


def _has_row(records: Records, what: str) -> bool:
    return any(row["what"] == what for row in _rows(records))


def _no_child_lives(folder: Path) -> bool:
    """Children of this run, which read its folder from their standard input, have its logs open."""
    for process in psutil.process_iter():
        try:
            files = [file.path for file in process.open_files()]
        except psutil.Error:
            continue
        if any(path.startswith(str(folder / "out")) for path in files):
            return False
    return True


def _has_checks(folder: Path) -> bool:
    return (folder / "out/gpu.json").exists() and bool(content(folder)["checks"])


def test_a_killed_command_leaves_no_child(tmp_path: Path) -> None:
    """Not even SIGKILL leaves a process on the device, and what was found can be read."""
    run = start(tmp_path, "--device", "cpu", "--kernel", "cpu", "--parts", "checks")
    until = time.monotonic() + 200
    while not _has_checks(tmp_path) and time.monotonic() < until:
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    while not _no_child_lives(tmp_path) and time.monotonic() < until:
        time.sleep(0.05)
    assert time.monotonic() < until
    assert content(tmp_path)["checks"]


def test_spent_budget_leaves_the_rest_out(tmp_path: Path) -> None:
    run = start(tmp_path, "--device", "cpu", "--kernel", "cpu", "--budget-s", "1e-6")
    run.communicate(timeout=60)
    assert run.returncode == 3
    found = content(tmp_path)
    assert found["rows"] == found["checks"] == []
    assert len(found["notes"]) == 11
    assert all("left out, the time is up" in note for note in found["notes"])


@needs_triton
def test_tiny_run_in_the_interpreter(tmp_path: Path) -> None:
    run = start(tmp_path, "--device", "cpu")
    text, _ = run.communicate(timeout=400)
    assert run.returncode == 0, text
    check_files(tmp_path)
    shipped = [row for row in content(tmp_path)["rows"] if row["rival"] == "as shipped"]
    assert len({row["what"] for row in shipped}) >= 8


@needs_pretended_gpu
@pytest.mark.parametrize("parts", [("ours", "decode")])
def test_tiny_run_on_a_pretended_gpu(parts: tuple[str, ...], tmp_path: Path) -> None:
    """Branches for CUDA, with the paths in torch: nothing of Triton can be launched there."""
    build()
    prefix = (sys.executable, "-m", "tests.helpers.pretended_gpu.run")
    run = start(tmp_path, "--device", "cuda", "--kernel", "cpu", "--parts", *parts, prefix=prefix)
    text, _ = run.communicate(timeout=200)
    assert run.returncode == 0, text
    rows = content(tmp_path)["rows"]
    assert {row["what"] for row in rows} == OPERATORS | DECODE
    assert all(row["peak_gib"] > 0 for row in rows)
    assert content(tmp_path)["facts"]["gpu"] == "pretended GPU"
