"""The GPU benchmark where there is none: bad arguments, the table, and a run of tiny sizes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from msa_kernels.select_blocks.op import select_blocks

from benchmarks.gpu.check import Check
from benchmarks.gpu.problem import M3, SMOKE, Tensors, make_index
from benchmarks.gpu.report import Rates, Result, Row, markdown
from benchmarks.gpu.run_all import main
from benchmarks.gpu.sparse import groups_at_once, torch_topk
from tests.helpers.triton_env import needs_triton

ROOT = Path(__file__).parents[2]
SMALL = ["--device", "cpu", "--smoke"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--device=cuda: no GPU can be used here; use --device cpu --smoke"),
        (["--device", "cpu"], "--device=cpu: the sizes are a GPU's; add --smoke"),
        ([*SMALL, "--kernel", "cpu", "--seq-lens", "65"], "--seq-lens=65: must be a multiple of 16"),
        ([*SMALL, "--kernel", "cpu", "--seq-lens", "0"], "--seq-lens=0"),
        ([*SMALL, "--kernel", "cpu", "--budget-s", "0"], "--budget-s=0.0: must be above 0"),
        ([*SMALL, "--kernel", "triton"], "--kernel=triton: triton is not installed"),
    ],
)
def test_bad_arguments(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("benchmarks.gpu.run_all.has_triton", lambda: False)
    assert main(["--out", str(tmp_path / "out"), *arguments]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"run_all.py: error: {words}")
    assert line.count("\n") == 1
    assert not (tmp_path / "out").exists()


def check_files(folder: Path) -> None:
    content = json.loads((folder / "gpu.json").read_text())
    assert content["correct"], content["checks"]
    assert content["notes"] == []
    assert {row["what"] for row in content["rows"]} == {
        *("scoring", "sparse forward", "sparse backward + KL", "prefill", "training step", "decode"),
        "selection against torch.topk",
    }
    assert all(row["ours_s"] > 0 for row in content["rows"])
    assert all(
        row["ratio"] for row in content["rows"] if row["what"] in ("prefill", "training step", "decode")
    )
    assert {goal["verdict"] for goal in content["goals"]} == {"not measured"}
    assert len(content["checks"]) == 14
    assert "selection against torch.topk" in (folder / "gpu.md").read_text()


def test_tiny_run(tmp_path: Path) -> None:
    assert main(["--out", str(tmp_path), *SMALL, "--kernel", "cpu", "--seed", "3"]) == 0
    check_files(tmp_path)


@needs_triton
def test_tiny_run_in_the_interpreter(tmp_path: Path) -> None:
    """The command itself, from another folder."""
    command = [sys.executable, str(ROOT / "benchmarks/gpu/run_all.py"), "--out", str(tmp_path), *SMALL]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*command, "--seed", "3"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    check_files(tmp_path)


def test_spent_budget_leaves_the_rest_out(tmp_path: Path) -> None:
    arguments = [*SMALL, "--kernel", "cpu", "--budget-s", "1e-6"]
    assert main(["--out", str(tmp_path), *arguments]) in (0, 1)
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["checks"]
    assert content["rows"] == []
    assert len(content["notes"]) == 3
    assert all("left out" in note for note in content["notes"])


def test_failed_check_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [Check("selection", 0.0, 1.0), Check("attention dq", math.nan, 1.0)]
    monkeypatch.setattr("benchmarks.gpu.run_all.run_checks", lambda *_args, **_kwargs: wrong)
    assert main(["--out", str(tmp_path), *SMALL, "--kernel", "cpu"]) == 1
    text = (tmp_path / "gpu.md").read_text()
    assert "A CHECK FAILED" in text
    assert "| attention dq | nan | 1 | FAILED |" in text
    assert json.loads((tmp_path / "gpu.json").read_text())["checks"][1]["error"] is None


def test_table_and_goals() -> None:
    rates = Rates(matmul_flops=1e15, copy_bytes=2e12)
    rows = [
        Row("prefill", 2**20, 1.0, 15.0, "FLASH_ATTENTION", flops=5e14, peak_gib=40.0).finish(rates),
        Row("training step", 2**17, 0.5, 6.0, "FLASH_ATTENTION").finish(rates),
        Row("training step", 2**15, 0.1, 0.1).finish(rates),
        Row("decode", 2**20, 1e-3, 8e-3, floor_bytes=1e9).finish(rates),
        Row("scoring", 2**15, 1.0, flops=9e14).finish(rates),
        Row("scoring", 2**17, 1.0, flops=6.5e14).finish(rates),
    ]
    result = Result("command", {"gpu": "none"}, rates, [Check("selection", 0.0, 1.0)], rows, ["a note"])
    text = markdown(result)
    assert "| prefill | 1048576 | 1000 | 1.5e+04 FLASH_ATTENTION | 15 | 500 | 50% |  | 40 |" in text
    assert "| prefill | 1048576 | 14.2 | 20.0 | 15 | reached |" in text
    assert "| training step | 131072 | 6.0 | 10.0 | 12 | aim reached |" in text
    assert "| training step | 32768 | 1.5 | 2.5 | 1 | missed |" in text
    assert "| scoring | 131072 | 0.6 | 0.75 | 0.65 | reached |" in text
    assert "| decode | 1048576 | 1 | 8 | 8 |  |  | 50% |  |" in text
    assert "- a note" in text
    assert result.correct


def test_topk_of_scores_in_memory_selects_the_same() -> None:
    index = make_index(Tensors(torch.device("cpu"), torch.float64, 5), SMOKE, 256)
    want = select_blocks(index.q, index.k, torch.tensor([0, 256]), block_size=16, topk=2)
    got = torch_topk(index, SMOKE)
    got = got.masked_fill(got < 0, 99).sort(-1).values
    assert torch.equal(got.masked_fill(got == 99, -1), want.long())


def test_work_of_m3() -> None:
    # 1M tokens, 4 groups, 2 x 128 operations for half of all pairs
    assert M3.scoring_flops(2**20) == 4 * 128 * 2.0**40
    assert M3.dense_flops(2**20) == 2 * 64 * 128 * 2.0**40
    # 16 heads, two products of 128 x 128 of one query with one block
    assert M3.pair_flops() == 16 * 2 * 2 * 128 * 128
    assert M3.decode_bytes(2**20, 2) == 2 * (2**20 * 128 + 4 * 16 * 128 * 2 * 128)
    assert [groups_at_once(M3, 2**n) for n in (15, 17, 19, 20)] == [4, 4, 2, 1]
