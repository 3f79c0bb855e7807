"""Check that what engine=deepspeed needs is on this machine, without importing it: that takes 2 seconds."""

from ctypes.util import find_library
from importlib.util import find_spec
from pathlib import Path

from msa_train.config import EngineKind, Offload, RunConfig


def check_deepspeed_here(config: RunConfig) -> None:
    """Check the package; refuse offload to NVMe, by its folder, its library, or as it cannot be saved.

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
    settings = config.deepspeed
    if Offload.nvme not in (settings.offload_optimizer, settings.offload_param):
        return
    if not Path(settings.nvme_path).is_dir():
        raise ValueError(
            f"deepspeed.nvme_path={settings.nvme_path}: is no folder here; make it, or name another"
        )
    if find_library("aio") is None:
        raise ValueError(
            f"deepspeed.nvme_path={settings.nvme_path}: nvme needs libaio with its headers; install "
            "libaio-dev, or use deepspeed.offload_optimizer=cpu and deepspeed.offload_param=cpu"
        )
    name = "offload_optimizer" if settings.offload_optimizer is Offload.nvme else "offload_param"
    raise ValueError(
        f"deepspeed.{name}=nvme: checkpoints do not reach what DeepSpeed keeps in files, so no run could be "
        f"saved; use deepspeed.{name}=cpu"
    )
