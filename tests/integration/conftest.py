"""A finished run that several tests look at: 19 steps over two processes, every checkpoint kept."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.training_command import TINY, train, write_corpus

STEPS, SELECTIONS_EVERY = 19, 9


@dataclass(slots=True)
class FinishedRun:
    """run_dir, what the command printed, and the settings of runs on the same corpus."""

    run_dir: Path
    output: str
    settings: tuple[str, ...]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Settings of a tiny model on a small corpus; only run_dir and train.steps are missing."""
    folder = tmp_path_factory.mktemp("tiny")
    write_corpus(folder / "corpus")
    return (*TINY, f"data.corpus={folder / 'corpus'}", f"data.cache_dir={folder / 'cache'}")


@pytest.fixture(scope="session")
def finished(tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A run that nothing disturbed, with TensorBoard."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    output = train(
        *tiny,
        f"run_dir={run_dir}",
        f"train.steps={STEPS}",
        "checkpoint.keep_last=0",
        f"logging.selections_every={SELECTIONS_EVERY}",
        "logging.tensorboard=true",
    )
    return FinishedRun(run_dir, output, tiny)
