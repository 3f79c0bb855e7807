"""Let go of an engine's process groups in processes that build several: each group has threads of its own."""

import gc

import torch.distributed as dist
from megatron.core import parallel_state

from msa_train.training.engines.engine import TrainEngine


def release(engine: TrainEngine) -> None:
    """End what DeepSpeed holds on to: hooks, and groups that it was given; other engines hold nothing."""
    inner = getattr(engine, "engine", None)
    if inner is None:
        return
    from deepspeed.utils import groups as known

    inner.destroy()
    known._WORLD_GROUP = None
    known._EXPERT_PARALLEL_GROUP.clear()
    known._EXPERT_DATA_PARALLEL_GROUP.clear()


def leave_groups() -> None:
    """Destroy all groups but the world's, once nobody holds an engine any more; all ranks call it."""
    parallel_state.destroy_model_parallel()
    gc.collect()
    dist.barrier()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()
