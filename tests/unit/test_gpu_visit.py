"""What is read from the results of a visit to a GPU, and the scripts' bad arguments."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine
from benchmarks.gpu import visit

ROOT = Path(__file__).parents[2]
CSV = """\
==PROF== Connected to process 12
==PROF== Profiling "attend_kernel" - 0: 0%....50%....100% - 6 passes
"ID","Process ID","Kernel Name","dram__bytes_read.sum","launch__registers_per_thread"
"","","","Gbyte","register/thread"
"0","12","attend_kernel","1,234.5","168"
"""


def rows(losses: list[float | None], first: int = 1) -> list[dict[str, Any]]:
    made = enumerate(losses, first)
    return [{"step": n, "lm_loss": loss, "memory_gib": n / 4, "tokens_per_s": 100.0 * n} for n, loss in made]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (rows([4.0, 3.0, 2.0, 1.0]), []),
        (rows([4.0, 3.0, 2.0]), ["steps of metrics.jsonl are [1, 2, 3], not 1 to 4"]),
        (rows([4.0, None, 2.0, 1.0]), ["a loss is missing or not finite: [4.0, None, 2.0, 1.0]"]),
        (
            rows([1.0, 3.0, 2.0, 1.0]),
            ["the loss does not fall: 1.000 in the first 1 steps, 1.000 in the last"],
        ),
    ],
)
def test_training(
    found: list[dict[str, Any]], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    assert visit.training_faults(visit.read_rows(tmp_path), 4) == words
    assert visit.main(["training", str(tmp_path), "--steps", "4"]) == (1 if words else 0)
    if not words:
        line = "loss 4.000 -> 1.000 in 4 steps, peak 1.00 GiB, 250 tokens/s (median)\n"
        assert capsys.readouterr().out == line


def test_counters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "forward.csv").write_text(CSV)
    (tmp_path / "backward.csv").write_text("==ERROR== no counters\n")
    assert visit.read_counters(tmp_path / "forward.csv") == [
        (
            "attend_kernel",
            {
                "dram__bytes_read.sum": "1,234.5 Gbyte",
                "launch__registers_per_thread": "168 register/thread",
            },
        )
    ]
    assert visit.main(["counters", str(tmp_path / "forward.csv")]) == 0
    names = [str(tmp_path / f"{name}.csv") for name in ("scoring", "forward", "backward")]
    assert visit.main(["counters", *names]) == 1
    output = capsys.readouterr().out
    assert "scoring.csv: no kernel was measured" in output
    assert "backward.csv: no kernel was measured" in output


def test_commit_of_a_copy_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("MSA_TRAIN_COMMIT", raising=False)
    assert machine.commit() == "unknown"
    monkeypatch.setenv("MSA_TRAIN_COMMIT", "0123abc")
    assert machine.commit() == "0123abc"
    # nor a git at all
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.machine()["commit"] == "0123abc"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name the folder to fill"),
        (["a", "b"], "b: one folder is enough"),
        (["--all", "a"], "--all: no such option"),
        (["--limit-mib", "much", "a"], "--limit-mib: a number of MiB must follow"),
    ],
)
def test_bad_command_lines_of_wheels(arguments: list[str], words: str, tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "benchmarks/gpu/wheels.sh"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"wheels.sh: error: {words}" in done.stderr
    assert not list(tmp_path.iterdir())
