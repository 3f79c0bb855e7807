"""Check that what engine=deepspeed needs is on this machine, without importing it: that takes 2 seconds."""

import os
from importlib.util import find_spec

from launchers.local.job_environment import WORKERS_PER_NODE
from launchers.local.nvme_checks import check_nvme_here
from msa_train.config import EngineKind, Offload, RunConfig


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
    if Offload.nvme in (config.deepspeed.offload_optimizer, config.deepspeed.offload_param):
        check_nvme_here(config, world_size, _ranks_here() if is_joined else world_size)


def _ranks_here() -> int:
    """Count the ranks of this machine by what torchrun or srun says; at least this one."""
    for name in ("LOCAL_WORLD_SIZE", WORKERS_PER_NODE, "SLURM_NTASKS_PER_NODE"):
        value = os.environ.get(name, "")
        if value.isdigit():
            return int(value)
    return 1
