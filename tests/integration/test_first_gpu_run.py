"""benchmarks/gpu/first_run.sh without a GPU, in a copy of the files without .git, as it goes to a machine."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WITHIN_S = 240
# Stands for Python: run_all.py and pytest end as FAKE_... say, everything else is Python's.
PYTHON = """\
#!/bin/sh
case "$*" in
    *"run_all.py"*"--parts checks"*) echo "of the checks"; exit "${FAKE_CHECKS:-0}" ;;
    *"run_all.py"*)
        while [ "$1" != --out ]; do shift; done
        echo "a row" >"$2/gpu.md"
        if [ "${FAKE_TABLE:-0}" = sleep ]; then exec sleep 100; fi
        exit "${FAKE_TABLE:-0}" ;;
    *"-m pytest"*) echo "2 passed, 1 skipped"; exit 0 ;;
esac
exec REAL "$@"
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files."""
    folder = tmp_path_factory.mktemp("copy") / "project"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "runs", "results", "first_run")
    shutil.copytree(ROOT, folder, ignore=unwanted)
    (folder / "tests/gpu").mkdir(exist_ok=True)
    return folder


def start(
    project: Path, out: Path, *arguments: str, stand_in: bool, **variables: str
) -> subprocess.Popen[str]:
    python = sys.executable
    if stand_in:
        path = project / "python"
        path.write_text(PYTHON.replace("REAL", sys.executable))
        path.chmod(0o755)
        python = str(path)
    dropped = ("PYTHONPATH", "MSA_PRETEND_GPU")
    environ = {name: value for name, value in os.environ.items() if name not in dropped}
    environ |= {"PYTHON": python, "CUDA_VISIBLE_DEVICES": "", "MSA_TRAIN_COMMIT": "0123abc", **variables}
    command = ["bash", str(project / "benchmarks/gpu/first_run.sh"), "--out", str(out), *arguments]
    # from another folder
    return subprocess.Popen(
        command, cwd=out.parent, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(
    project: Path, out: Path, *arguments: str, stand_in: bool = True, **variables: str
) -> tuple[int, str]:
    """Exit code and output."""
    process = start(project, out, *arguments, stand_in=stand_in, **variables)
    output, _ = process.communicate(timeout=WITHIN_S)
    return process.returncode, output


def parts(out: Path) -> list[list[str]]:
    """Part, result and exit code of every row of parts.tsv."""
    return [line.split("\t")[:3] for line in (out / "parts.tsv").read_text().splitlines()]


def test_a_failed_part_stops_no_other_and_is_tried_again(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, output = run(
        project, out, "--smoke", "--parts", "checks", "table", "tests", "profile", FAKE_CHECKS="1"
    )
    assert code == 1, output
    assert parts(out) == [
        ["checks", "failed", "1"],
        ["table", "passed", "0"],
        ["tests", "passed", "0"],
        ["profile", "not here", "77"],
    ]
    lines = output.splitlines()
    assert lines[0].startswith("no GPU, torch ")
    assert lines[0].endswith(", commit 0123abc")
    assert "    | of the checks" in lines
    assert any(line.startswith("tests    passed, ") and "2 passed, 1 skipped" in line for line in lines)
    summary = lines[next(i for i, line in enumerate(lines) if line.startswith("--- after")) + 1 :]
    assert summary[:4] == ["checks   failed", "table    passed", "tests    passed", "profile  not here"]
    assert (out / "gpu.md").read_text() == "a row\n"
    with tarfile.open(out / "first_run.tar.gz") as packed:
        assert {"./checks.log", "./table.log", "./parts.tsv", "./gpu.md"} <= set(packed.getnames())

    # on another machine, from what was packed
    other = tmp_path / "other"
    other.mkdir()
    (out / "first_run.tar.gz").rename(other / "first_run.tar.gz")
    code, output = run(project, other, "--smoke", "--parts", "checks", "table", FAKE_TABLE="3")
    assert code == 0, output
    assert "table    passed before, with the same code: skipped\n" in output
    assert parts(other)[4:] == [["checks", "passed", "0"]]

    # other code is to be tried again, and its unfinished table
    (project / "kernels/another.py").write_text("")
    code, output = run(project, other, "--smoke", "--parts", "table", FAKE_TABLE="3")
    assert code == 3, output
    assert parts(other)[5:] == [["table", "unfinished", "3"]]


def test_a_signal_ends_it_and_keeps_all(project: Path, tmp_path: Path) -> None:
    out, temporary = tmp_path / "out", tmp_path / "temporary"
    temporary.mkdir()
    process = start(
        project,
        out,
        "--smoke",
        "--parts",
        "checks",
        "table",
        "tests",
        stand_in=True,
        FAKE_TABLE="sleep",
        TMPDIR=str(temporary),
    )
    deadline = time.monotonic() + WITHIN_S
    while not (out / "table/gpu.md").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 143, output
    assert [row[:2] for row in parts(out)] == [["checks", "passed"], ["table", "stopped"]]
    with tarfile.open(out / "first_run.tar.gz") as packed:
        assert "./table/gpu.md" in packed.getnames()
    assert not list(temporary.iterdir())


def test_nothing_is_begun_without_time(project: Path, tmp_path: Path) -> None:
    code, output = run(project, tmp_path / "out", "--smoke", "--budget-s", "10", "--parts", "checks")
    assert code == 3, output
    assert "checks   not begun: " in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--parts", "chekcs"], "--parts=chekcs: must be among checks trainer tests table profile"),
        (["--parts"], "--parts: names must follow"),
        (["--budget-s", "0"], "--budget-s=0: must be a whole number of seconds"),
        (["--smoke", "--wheels", "nowhere"], "nowhere: has no wheels"),
        (["--fast"], "--fast: no such option"),
        (["--parts", "checks"], "no GPU can be used here; --smoke does without"),
    ],
)
def test_bad_command_lines(arguments: list[str], words: str, project: Path, tmp_path: Path) -> None:
    code, output = run(project, tmp_path / "out", *arguments)
    assert code == 2, output
    assert f"first_run.sh: error: {words}" in output.replace(f"--wheels={tmp_path}/", "")


def test_trains_and_goes_on(project: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, output = run(project, out, "--smoke", "--parts", "trainer", stand_in=False)
    assert code == 0, output + (out / "trainer.log").read_text()
    assert " -> " in output
    assert ", peak " in output
    log = (out / "trainer.log").read_text()
    assert "going on from step 4" in log
    assert "step_00000008: sound" in log
    assert {path.name for path in (out / "trainer").iterdir()} == {"metrics.jsonl", "summary.json"}
