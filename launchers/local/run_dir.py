"""Claim the folder of a run: writable, held by one launcher at a time, with the resolved configuration in it.

Two starts in one folder would remove each other's checkpoints. On one machine, and on file systems that have
locks across machines, a lock keeps the second one out; elsewhere the fencing token does, which every write of
a checkpoint compares with the start's own.
"""

import fcntl
import os
import re
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import TextIO

from launchers.hydra_config.compose import config_to_yaml
from launchers.local.job_environment import slurm_generation
from msa_train.config import RunConfig, plan_stages
from msa_train.config.model_size import model_size
from msa_train.runtime.atomic_files import new_file, open_to_append, remove_partials
from msa_train.runtime.fencing import claim
from msa_train.runtime.next_stage import clear_next
from msa_train.runtime.preemption import clear_stopped
from msa_train.training.metrics.writer import METRICS_NAME
from msa_train.training.stability.skip_policy import LOG_NAME as BAD_STEPS_NAME

CONFIG_NAME = "config.yaml"
_LOCK_NAME = ".lock"
# parameters and AdamW's master weights and two moments, fp32
CHECKPOINT_BYTES_PER_PARAMETER = 16


def check_writable(run_dir: str) -> None:
    """Write a file where run_dir is or would be, and leave nothing behind.

    Permissions alone do not tell: a full disk, a quota and a read-only mount refuse too.

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
    # lexists: a link to nothing is there too, and no folder can be made under its name
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"msa-train")
    except OSError as error:
        raise _unwritable(run_dir, error) from error


def claim_run_dir(run_dir: str) -> TextIO:
    """Create the folder, take its lock and become the start that may write checkpoints.

    An earlier start of the same Slurm job may live on, cut off, on a lost node, and hold the lock. It is
    taken over from: once its fencing token is no longer the newest it can save nothing more.

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
        # some network file systems have no locks; going on with the fencing token alone is better than not
        pass
    # after the lock is held: before, this would wipe out the name of who holds it
    lock.truncate(0)
    lock.write(f"pid {os.getpid()} on {socket.gethostname()}, start {start}")
    lock.flush()
    remove_partials(folder)
    claim(run_dir, start)
    clear_stopped(run_dir)
    clear_next(run_dir)
    return lock


def _is_earlier_start(holder: str, start: str) -> bool:
    """Tell whether the holder is an earlier start of this Slurm job.

    Example: "pid 5 on node1, start 7.0" and "7.1" -> True; and "8.0" -> False.
    """
    held, own = re.search(r"start (\d+)\.(\d+)$", holder), re.fullmatch(r"(\d+)\.(\d+)", start)
    return bool(held and own and held[1] == own[1] and int(held[2]) < int(own[2]))


def write_config(config: RunConfig) -> Path:
    """Write the resolved configuration; one of an earlier start that differs is kept beside it.

    Returns:
        Its path, which workers read.
    """
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
    """Warn if the disk of run_dir cannot hold the checkpoints that the run will keep; None if it can.

    Example: 10B parameters, keep_last 2 -> 3 checkpoints of 160 GB: the oldest goes once the newest is whole.
    """
    if not config.checkpoint.every:
        return None
    size = model_size(config.model, config.attention).total * CHECKPOINT_BYTES_PER_PARAMETER
    kept = config.checkpoint.keep_last + 1 if config.checkpoint.keep_last else 2
    if config.checkpoint.keep_stage_ends:
        kept += len(plan_stages(config)) - 1
    free = shutil.disk_usage(Path(config.run_dir)).free
    if free >= kept * size:
        return None
    return (
        f"run_dir={config.run_dir}: {free / 1e9:.1f} GB are free and {kept} checkpoints take about "
        f"{kept * size / 1e9:.1f} GB; free some space, or lower checkpoint.keep_last"
    )


def _unwritable(run_dir: str, error: OSError) -> ValueError:
    """Build the error of a folder that cannot be written."""
    return ValueError(
        f"run_dir={run_dir}: cannot be written ({error.strerror}: {error.filename or run_dir}); use a "
        "folder that you may write to, e.g. run_dir=runs/mine"
    )
