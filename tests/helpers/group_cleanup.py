"""Leave the process groups of one case before the next one builds its own."""

import gc
import sys

import torch.distributed as dist
from megatron.core import parallel_state
from torch.distributed import distributed_c10d


def leave_groups() -> None:
    """Destroy all groups but the whole world's; all ranks call it, and nothing of the case may run any more.

    Each group of gloo has threads that wake a hundred times a second: a hundred groups that nobody needs take
    a processor.
    """
    parallel_state.destroy_model_parallel()
    _forget_engines()
    _forget_deepspeed_groups()
    # engines hold groups in cycles of references
    gc.collect()
    # nobody leaves a group in which others still wait
    dist.barrier()
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _forget_engines() -> None:
    """Take engines of DeepSpeed apart, which would outlive their case.

    Hooks of parameters keep DeepSpeed's objects alive, with the groups that these hold, where no collector of
    garbage sees them: 50 threads of each process with every case of zero_stage 3.
    """
    if "deepspeed.runtime.engine" not in sys.modules:
        return
    kind = sys.modules["msa_train.training.engines.deepspeed_engine"].DeepSpeedEngine
    for engine in [one for one in gc.get_objects() if type(one) is kind]:
        if not vars(engine):
            continue
        engine.close()
        for part in (*engine.model.parameters(), *engine.model.modules(), engine.engine.optimizer):
            vars(part).clear()
        for part in (engine.engine, engine.gradients, engine):
            vars(part).clear()
    # modules whose forward pass ended otherwise than DeepSpeed thinks
    sys.modules["deepspeed.runtime.zero.parameter_offload"].FWD_MODULE_STACK.clear()


def _forget_deepspeed_groups() -> None:
    """Clear what DeepSpeed keeps in its modules, where it was imported."""
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is not None:
        groups._WORLD_GROUP = None
        groups._EXPERT_PARALLEL_GROUP.clear()
        groups._EXPERT_DATA_PARALLEL_GROUP.clear()
