"""Check that what engine=deepspeed needs is on this machine, without importing it: that takes 2 seconds.

What DeepSpeed does without the checks of offload to NVMe: it compiles for minutes and fails then, ends the
process by an assertion where memory cannot be locked, and trains on wrong numbers where a disk is full, as it
looks at no result of a write.
"""

import os
import resource
import shutil
import subprocess
import sysconfig
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from launchers.local.job_environment import WORKERS_PER_NODE
from msa_train.config import EngineKind, Offload, RunConfig
from msa_train.config.deepspeed.async_io import async_io_file
from msa_train.config.deepspeed.state_bytes import zero_bytes
from msa_train.config.model_size import model_size

_PROGRAM = "#include <libaio.h>\nint main(void) { return io_submit(0, 0, 0); }\n"
_LIBRARY_FIX = "install libaio-dev (Debian, Ubuntu) or libaio-devel (Red Hat)"
# left to others on the disk
_SPARE_BYTES = 2**30
# of a compilation; some 5 minutes on an idle machine
_STALE_LOCK_S = 3600
_CAN_LOCK_MEMORY = 1 << 14


def check_deepspeed_here(config: RunConfig, world_size: int, *, is_joined: bool = False) -> None:
    """Check the package, and where something is in files all that this needs.

    Args:
        config: the whole run, whose rules hold.
        world_size: ranks of the job.
        is_joined: torchrun or srun started this rank; else all ranks will be on this machine.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    if config.engine is not EngineKind.deepspeed:
        return
    if find_spec("deepspeed") is None:
        raise ValueError(
            "engine=deepspeed: the deepspeed package is not installed; install msa-train[deepspeed], or use "
            "engine=torch"
        )
    if config.deepspeed.uses_nvme:
        check_nvme_here(config, world_size, _ranks_here() if is_joined else world_size)


def _ranks_here() -> int:
    """Count the ranks of this machine by what torchrun or srun says; at least this one."""
    for name in ("LOCAL_WORLD_SIZE", WORKERS_PER_NODE, "SLURM_NTASKS_PER_NODE"):
        value = os.environ.get(name, "")
        if value.isdigit():
            return int(value)
    return 1


def check_nvme_here(config: RunConfig, world_size: int, ranks_here: int) -> None:
    """Check folder, disk, memory and library, the cheap ones first.

    Args:
        config: with offload to NVMe.
        world_size: ranks of the job.
        ranks_here: of them on this machine.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    settings = config.deepspeed
    where = f"deepspeed.nvme_path={settings.nvme_path}"
    names = [name for name in ("offload_optimizer", "offload_param") if _is_nvme(config, name)]
    instead = " and ".join(f"deepspeed.{name}=cpu" for name in names)
    _check_folder(where, Path(settings.nvme_path))
    size = model_size(config.model, config.attention).total
    zero = zero_bytes(settings, config.train.precision)
    own = size / world_size
    _check_space(where, Path(settings.nvme_path), zero.files(own) * ranks_here, instead)
    _check_memory_lock(names[0], zero.host_buffers(own), instead)
    _check_library(names[0], instead)


def _is_nvme(config: RunConfig, name: str) -> bool:
    return getattr(config.deepspeed, name) is Offload.nvme


def _check_folder(where: str, folder: Path) -> None:
    """Write a block past the page cache, as DeepSpeed does, and leave nothing behind."""
    if not folder.is_dir():
        raise ValueError(f"{where}: is no folder here; make it on a local disk, or name another")
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            os.close(os.open(file.name, os.O_WRONLY | os.O_DIRECT))
    except PermissionError:
        raise ValueError(f"{where}: cannot be written by this user; name another folder") from None
    except OSError as error:
        raise ValueError(
            f"{where}: a file cannot be written past the page cache ({error.strerror}); use a folder on a "
            "local disk with ext4 or xfs, none in memory"
        ) from None


def _check_space(where: str, folder: Path, need: float, instead: str) -> None:
    free = shutil.disk_usage(folder).free
    if need + _SPARE_BYTES > free:
        raise ValueError(
            f"{where}: the ranks of this machine need {need / 1e9:,.1f} GB there, with a checkpoint that is "
            f"on its way, and {free / 1e9:,.1f} GB are free; use a larger disk, more machines, or {instead}"
        )


def _check_memory_lock(name: str, need: float, instead: str) -> None:
    """Compare buffers with what a process may lock; root may lock all."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit != resource.RLIM_INFINITY and need > limit and not _may_lock_all():
        raise ValueError(
            f"deepspeed.{name}=nvme: each rank locks at least {need / 1e6:,.0f} MB of memory and may lock "
            f"{limit / 1e6:,.0f} MB; use ulimit -l unlimited (containers: --ulimit memlock=-1), or {instead}"
        )


def _may_lock_all() -> bool:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return False
    found = [int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")]
    return any(value & _CAN_LOCK_MEMORY for value in found)


def _check_library(name: str, instead: str) -> None:
    """Check DeepSpeed's library, or what it takes to compile it; it links with libaio at every start."""
    file = async_io_file()
    if file.parent.name == "aio" and file.is_file():
        # compiled when DeepSpeed was installed
        return
    refused = f"deepspeed.{name}=nvme: DeepSpeed's async_io "
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    needed = [compiler, "ninja"] if file.is_file() else [compiler, os.environ.get("CXX", "c++"), "ninja"]
    for tool in needed:
        if shutil.which(tool) is None and shutil.which(tool, path=sysconfig.get_path("scripts")) is None:
            package = "ninja" if tool == "ninja" else "g++"
            raise ValueError(f"{refused}needs {tool}, which is not here; install {package}, or use {instead}")
    if not _links(compiler):
        raise ValueError(f"{refused}needs libaio with its headers; {_LIBRARY_FIX}, or use {instead}")
    lock = file.with_name("lock")
    if not file.is_file() and lock.exists() and time.time() - lock.stat().st_mtime > _STALE_LOCK_S:
        raise ValueError(
            f"{refused}was being compiled by a process that has ended, others would wait; remove {lock}"
        )


def _links(compiler: str) -> bool:
    """Compile and link one line, with the flags that DeepSpeed takes from the environment too."""
    flags = [os.environ.get(name, "").split() for name in ("CFLAGS", "LDFLAGS")]
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "links.c"), Path(folder, "links")
        source.write_text(_PROGRAM)
        arguments = [compiler, *flags[0], str(source), *flags[1], "-laio", "-o", str(program)]
        return subprocess.run(arguments, capture_output=True, check=False).returncode == 0
