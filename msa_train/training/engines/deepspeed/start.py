"""Bring DeepSpeed into a job that runs already: its import, the groups it may use, its silence.

DeepSpeed would make groups of its own, with a time limit of its own, and start torch.distributed. It is given
the job's groups instead, so launcher.timeout_s and the watch hold for it. It never hears of context
parallelism: its data-parallel group is that of all ranks, which hold the same weights and each have a part of
the tokens. Everything else that DeepSpeed offers for split sequences was seen to reduce over too few ranks.
"""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from msa_train.parallel.process_groups import Groups


def import_deepspeed(groups: Groups) -> Any:
    """Import DeepSpeed for this rank's device and hand it the job's groups; 2 seconds at the first call.

    Raises:
        ValueError: DeepSpeed is not installed, or cannot be imported.
    """
    on_cpu = groups.device.type == "cpu"
    if on_cpu:
        # else it looks for accelerators, and says that there are none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # the job's launcher sets it; a test's need not
    os.environ.setdefault("LOCAL_RANK", str(groups.device.index or 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import deepspeed
            from deepspeed import comm
            from deepspeed.utils import groups as known
        except ImportError as error:
            raise ValueError(
                f"engine=deepspeed: the deepspeed package cannot be imported ({error}); install "
                "msa-train[deepspeed], or use engine=torch"
            ) from None
    _keep_quiet()
    if on_cpu:
        _leave_out_shared_memory()
    # takes over the process group that is there
    comm.init_distributed(dist_backend="gloo" if on_cpu else "nccl", verbose=False)
    known._WORLD_GROUP = groups.dp_cp
    if groups.ep_size > 1:
        name = expert_group_name(groups)
        known._EXPERT_PARALLEL_GROUP[name] = groups.ep
        known._EXPERT_DATA_PARALLEL_GROUP[name] = groups.expert_dp
    return deepspeed


def expert_group_name(groups: Groups) -> str:
    """Return the name by which DeepSpeed knows the groups of the experts."""
    return f"ep_size_{groups.ep_size}"


def mark_experts(model: nn.Module, groups: Groups, num_experts: int) -> None:
    """Mark experts as parameters of their own groups, or as ordinary ones where every rank has all.

    DeepSpeed looks for a module of its own class before it heeds the marks of parameters: without one, ZeRO
    takes different experts for copies of each other. The module holds nothing and is never run.
    """
    is_spread = groups.ep_size > 1
    for parameter in model.parameters():
        if not getattr(parameter, "allreduce", True):
            parameter.allreduce = not is_spread  # type: ignore[attr-defined]
            if is_spread:
                parameter.group_name = expert_group_name(groups)  # type: ignore[attr-defined]
    if not is_spread:
        return
    from deepspeed.moe.layer import MoE

    class ExpertMark(MoE):
        """Say that the model has experts."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = num_experts

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """Do nothing: the groups are there."""

    model.add_module("deepspeed_experts", ExpertMark())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what DeepSpeed tells of a start that goes well: memory, and that it has not tested AdamW."""
    logger = logging.getLogger("DeepSpeed")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


def _keep_quiet() -> None:
    """Leave out what helps no user: errors and warnings stay."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # one for each collective: torch has renamed them, DeepSpeed takes the old names
    warnings.filterwarnings(
        "ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning
    )


def _leave_out_shared_memory() -> None:
    """Keep DeepSpeed from compiling collectives over shared memory: 2 minutes of g++, gloo does without."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
