"""Fence off older starts of a run, which may no longer write its checkpoints. Standard library only.

After a network split, processes of an old start can live on beside those of the requeued one. Every start
writes its fencing token into run_dir; who finds another one there has been superseded and must publish
nothing. Fencing tokens: Kleppmann, Designing Data-Intensive Applications (2017), chapter 8. Tokens are
compared for equality only: the last one that was claimed is the one that counts.
"""

import os
from pathlib import Path

from msa_train.runtime.atomic_files import new_file

GENERATION_NAME = ".generation"
VARIABLE = "MSA_TRAIN_GENERATION"


class SupersededError(RuntimeError):
    """Report that another start has taken over this run_dir."""


def own_token() -> str:
    """Return the fencing token of this process's start, empty where nobody has given it one.

    Under Slurm it is job and restart: "7.0" of job 7 at its first start.
    """
    return os.environ.get(VARIABLE, "")


def claim(run_dir: str | Path, generation: str) -> None:
    """Make this the start that may write; for the one process that owns run_dir."""
    os.environ[VARIABLE] = generation
    path = Path(run_dir) / GENERATION_NAME
    with new_file(path) as file:
        file.write(generation + "\n")


def check_not_superseded(run_dir: str | Path) -> None:
    """Make sure that no later start has taken over.

    Raises:
        SupersededError: naming both.
    """
    own = own_token()
    try:
        current = (Path(run_dir) / GENERATION_NAME).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return
    if own and current != own:
        raise SupersededError(
            f"run_dir={run_dir}: start {current} has taken over from start {own}, which may write no more"
        )
