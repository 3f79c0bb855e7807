"""Training in which the disk of rank 1 hangs while it writes its part of a checkpoint."""

import os
import time
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystemWriter

from msa_train.config import RunConfig
from msa_train.training.main import run_worker


def run(config: RunConfig) -> None:
    """See run_worker."""
    if os.environ["RANK"] == "1":
        FileSystemWriter.write_data = _hang  # type: ignore[method-assign]
    run_worker(config)


def _hang(*_: Any) -> Any:
    time.sleep(10_000)
