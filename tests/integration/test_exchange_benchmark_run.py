"""The exchange benchmark, a small run of it over loopback and, where it can be made, over limited links."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.exchange.schemes import SCHEMES

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--seq-len", "256", "--rounds", "1"]
FEW = ["--schemes", "all_gather", "selected"]


def run(
    out: Path, *arguments: str, program: Sequence[str] = ("-m", "benchmarks.exchange.run")
) -> subprocess.CompletedProcess[str]:
    """The benchmark's command."""
    command = [sys.executable, *program, *SMALL, "--out", str(out), *arguments]
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Rows of what was written."""
    return json.loads((out / "exchange.json").read_text())["rows"]


def test_over_loopback(tmp_path: Path) -> None:
    done = run(tmp_path, "--unshaped", "--parts", "2x2", "--selections", "0.5", "--schemes", *SCHEMES)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path)
    assert [row["scheme"] for row in rows] == list(SCHEMES)
    for row in rows:
        assert row["worst_row_error"] < 2e-5
        assert row["counted_bytes"] == row["formula_bytes"]
        assert row["step_s_median"] > 0
    memory = json.loads((tmp_path / "exchange.json").read_text())["memory"]
    assert all(peak > 0 for row in memory for peak in row["peak_bytes"])
    assert "| 2x2 | 0.500 |" in (tmp_path / "exchange.md").read_text()


# Rates by which `auto` never sends over nodes; ranks are forked and calibrate with them.
SLOW_NODES = """
import sys
from dataclasses import replace
from benchmarks.exchange import rank, run
from msa_train.parallel.comm import topology
from msa_train.parallel.comm.link_rates import Line
measure = topology.measure_rates
def slow_nodes(comm):
    return replace(measure(comm), outer=Line(1.0, 1.0), all_to_all=Line(0.0, 0.0))
topology.measure_rates = rank.measure_rates = slow_nodes
sys.exit(run.main(sys.argv[1:]))
"""


def test_auto_may_change_its_way_between_steps(tmp_path: Path) -> None:
    arguments = [
        "--unshaped",
        "--parts",
        "2x2",
        "--selections",
        "0.5",
        "--schemes",
        "auto_sliced",
        "--no-memory",
    ]
    done = run(tmp_path, *arguments, program=["-c", SLOW_NODES])
    assert done.returncode == 0, done.stderr
    row = rows_of(tmp_path)[1]
    assert row["used"] == "selected", "between two steps from nodes to a flat exchange"
    assert row["counted_bytes"] == row["formula_bytes"]


def test_over_limited_links(tmp_path: Path) -> None:
    done = run(tmp_path, "--rates", "100", "--parts", "2", "--selections", "0.2", "--no-memory", *FEW)
    if done.returncode == 2 and "--unshaped" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path)
    assert [row["rate_mbit"] for row in rows] == [0, 0, 100, 100]
    for row in rows:
        assert sum(row["formula_bytes"]) <= sum(row["interface_received_bytes"])
        assert sum(row["interface_received_bytes"]) < 1.05 * sum(row["formula_bytes"])
        if row["rate_mbit"] and row["scheme"] == "all_gather":
            # Half: what the buckets let through at once is much for so few bytes.
            assert row["step_s_median"] > 0.5 * max(row["formula_bytes"]) * 8 / 100e6


def test_a_bad_argument_is_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, "--selections", "2.5", "--unshaped")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "exchange benchmark: error: --selections 2.5: must be `trained` or a share from 0 to 1"
    ]
