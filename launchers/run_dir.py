"""The folder of a run: writable, held by one launcher at a time, with the resolved configuration in it."""

import fcntl
import os
import re
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import TextIO

from launchers.compose import config_to_yaml
from launchers.join import slurm_generation
from launchers.model_size import model_size
from msa_train.config import RunConfig
from msa_train.files import new_file, open_to_append, remove_partials
from msa_train.training.bad_steps import LOG_NAME as BAD_STEPS_NAME
from msa_train.training.generation import take_over
from msa_train.training.metrics import METRICS_NAME
from msa_train.training.stop import clear_stopped

CONFIG_NAME = "config.yaml"
_LOCK_NAME = ".lock"
# parameters and AdamW's master weights and two moments, fp32
CHECKPOINT_BYTES_PER_PARAMETER = 16


def check_writable(run_dir: str) -> None:
    """Write a file where run_dir is or would be, and leave nothing behind.

    Raises:
        ValueError: if that is not possible, or a file that a run appends to is a link.
    """
    for name in (_LOCK_NAME, METRICS_NAME, BAD_STEPS_NAME):
        if (Path(run_dir) / name).is_symlink():
            target = os.readlink(Path(run_dir) / name)
            raise ValueError(
                f"run_dir={run_dir}: {name} is a link to {target}, and links are not written through; remove "
                "the link, or use another run_dir"
            )
    folder = Path(run_dir).absolute()
    # a link to nothing is there: no folder can be made under its name
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"msa-train")
    except OSError as error:
        raise _unwritable(run_dir, error) from error


def claim_run_dir(run_dir: str) -> TextIO:
    """Create the folder, take its lock and become the start that may write checkpoints.

    A start of the same Slurm job that lives on, cut off, on another node is taken over from.

    Returns:
        The lock file; the lock lasts until it is closed or the process ends, however it ends.

    Raises:
        ValueError: if the folder cannot be written or another msa-train holds it.
    """
    folder = Path(run_dir)
    start = slurm_generation(os.environ) or f"{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(run_dir)
        lock = open_to_append(folder / _LOCK_NAME)
    except OSError as error:
        raise _unwritable(run_dir, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "an unknown process"
        if not _is_earlier_start(holder, start):
            lock.close()
            raise ValueError(
                f"run_dir={run_dir}: another msa-train ({holder}) is using it; wait for its end, stop it, or "
                "use another run_dir"
            ) from None
    except OSError:
        # some network file systems have no locks; going on without is better than not going
        pass
    lock.truncate(0)
    lock.write(f"pid {os.getpid()} on {socket.gethostname()}, start {start}")
    lock.flush()
    remove_partials(folder)
    take_over(run_dir, start)
    clear_stopped(run_dir)
    return lock


def _is_earlier_start(holder: str, start: str) -> bool:
    """Whether both are starts of one Slurm job: "pid 5 on node1, start 7.0" and "7.1" -> True."""
    held, own = re.search(r"start (\d+)\.(\d+)$", holder), re.fullmatch(r"(\d+)\.(\d+)", start)
    return bool(held and own and held[1] == own[1] and int(held[2]) < int(own[2]))


def write_config(config: RunConfig) -> Path:
    """Write the resolved configuration; one of an earlier start that differs is kept beside it."""
    path = Path(config.run_dir) / CONFIG_NAME
    write_keeping(path, config_to_yaml(config))
    return path


def write_keeping(path: Path, text: str) -> None:
    """Write a file whole or not at all; an earlier one that differs is kept: config.20260101-120000.yaml."""
    # bytes: an earlier one may be damaged
    if path.exists() and path.read_bytes() != text.encode():
        written = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
        kept = path.with_name(f"{path.stem}.{written}{path.suffix}")
        # after a clock that went back, or a copy that kept no times
        number = 1
        while os.path.lexists(kept):
            number += 1
            kept = path.with_name(f"{path.stem}.{written}-{number}{path.suffix}")
        path.replace(kept)
    with new_file(path) as file:
        file.write(text)


def disk_warning(config: RunConfig) -> str | None:
    """A warning if the disk of run_dir cannot hold the checkpoints that the run will keep."""
    if not config.checkpoint.every:
        return None
    size = model_size(config.model, config.attention).total * CHECKPOINT_BYTES_PER_PARAMETER
    kept = config.checkpoint.keep_last + 1 if config.checkpoint.keep_last else 2
    free = shutil.disk_usage(Path(config.run_dir)).free
    if free >= kept * size:
        return None
    return (
        f"run_dir={config.run_dir}: {free / 1e9:.1f} GB are free and {kept} checkpoints take about "
        f"{kept * size / 1e9:.1f} GB; free some space, or lower checkpoint.keep_last"
    )


def _unwritable(run_dir: str, error: OSError) -> ValueError:
    return ValueError(
        f"run_dir={run_dir}: cannot be written ({error.strerror}: {error.filename or run_dir}); use a "
        "folder that you may write to, e.g. run_dir=runs/mine"
    )
