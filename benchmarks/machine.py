"""Tell what a benchmark ran on, and which code: part of every result."""

import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# names the commit where a copy of the files came without its .git
COMMIT_VARIABLE = "MSA_TRAIN_COMMIT"


def command(module: str, argv: Sequence[str]) -> str:
    """Write how a benchmark was started, without `--out`: where figures are written does not change them.

    Example: "benchmarks.exchange.run", ["--out", "here", "--rounds", "1"] -> "python -m
    benchmarks.exchange.run --rounds 1".
    """
    kept: list[str] = []
    left = iter(argv)
    for text in left:
        if text == "--out":
            next(left, None)
        elif not text.startswith("--out="):
            kept.append(text)
    return " ".join(["python -m", module, *kept])


def status_bytes(key: str, process: Path = Path("/proc/self")) -> int:
    """Read a size from a process's status, as VmRSS (resident now) or VmHWM (the most so far), in bytes.

    Raises:
        OSError: the process has ended.
        ValueError: there is no such size.
    """
    for line in (process / "status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{key}: is not in {process}/status; the memory measurement needs Linux")


def machine() -> dict[str, Any]:
    """Collect commit, processor, cores, kernel, Python."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "commit": commit(),
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def commit() -> str:
    """Return what git says, with `-dirty` behind it where files differ; else what MSA_TRAIN_COMMIT says."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        said = git.stdout.strip()
    except OSError:
        said = ""
    return said or os.environ.get(COMMIT_VARIABLE, "").strip() or "unknown"
