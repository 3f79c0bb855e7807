"""Starts Megatron's process groups. The one place that reads Megatron's globals."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from msa_train.config import ExchangeConfig, ParallelConfig
from msa_train.parallel.comm.cp_comm import CpComm
from msa_train.parallel.comm.fault_watch import FaultWatch
from msa_train.parallel.comm.job import limit_s
from msa_train.parallel.comm.topology import build_comm


@dataclass(slots=True)
class Groups:
    """This rank's place in the world.

    dp_cp: ranks that hold the same dense parameters; expert_dp: the same experts. model_parallel: ranks
    that hold the parts of one model (tensor and pipeline). comm: context-parallel collectives, to be copied.
    """

    collection: ProcessGroupCollection
    device: torch.device
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    ep_rank: int
    ep_size: int
    cp: dist.ProcessGroup
    dp: dist.ProcessGroup
    dp_cp: dist.ProcessGroup
    ep: dist.ProcessGroup
    expert_dp: dist.ProcessGroup
    model_parallel: dist.ProcessGroup
    comm: CpComm

    @property
    def is_pipeline_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_pipeline_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pp_rank == self.pp_size - 1

    def cp_comm(self) -> CpComm:
        """Fresh context-parallel collectives with their own counters of bytes and time."""
        return self.comm.with_new_counters()


def build_groups(
    parallel: ParallelConfig,
    *,
    device: torch.device,
    timeout_s: int = 600,
    exchange: ExchangeConfig | None = None,
    watch: FaultWatch | None = None,
) -> Groups:
    """Create Megatron's groups over the initialised world. watch: of the job, if there is one.

    Expert parallelism spans tensor, context and data parallel ranks of a pipeline stage (Megatron's order
    tp-cp-ep-dp-pp), so ep_size may exceed the data-parallel size.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp_size,
        pipeline_model_parallel_size=parallel.pp_size,
        context_parallel_size=parallel.cp_size,
        expert_model_parallel_size=parallel.ep_size,
        expert_tensor_parallel_size=1,
        # a fraction of a minute is as good
        distributed_timeout_minutes=limit_s(device, timeout_s) / 60,  # pyright: ignore[reportArgumentType]
    )
    # No dropout anywhere, so the tracker that does nothing is enough and works without a GPU.
    model_parallel_cuda_manual_seed(1, inference_rng_tracker=True, force_reset_rng=True)
    cp = _group(parallel_state.get_context_parallel_group())
    return Groups(
        collection=ProcessGroupCollection.use_mpu_process_groups(),
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel.tp_size,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel.pp_size,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel.cp_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=parallel.ep_size,
        cp=cp,
        dp=_group(parallel_state.get_data_parallel_group()),
        dp_cp=_group(parallel_state.get_data_parallel_group(with_context_parallel=True)),
        ep=_group(parallel_state.get_expert_model_parallel_group()),
        expert_dp=_group(parallel_state.get_expert_data_parallel_group()),
        model_parallel=_group(parallel_state.get_model_parallel_group()),
        comm=build_comm(
            cp,
            parallel.kv_exchange,
            exchange or ExchangeConfig(),
            device,
            timeout_s,
            head_size=parallel.cp_head_size,
            watch=watch,
        ),
    )


def _group(group: object) -> dist.ProcessGroup:
    """Narrow what torch types as "group or not a member"; every rank is in each of these groups."""
    assert isinstance(group, dist.ProcessGroup), f"rank {dist.get_rank()} is not in a group it needs"
    return group


def destroy_groups(groups: Groups | None = None) -> None:
    """Undo build_groups and init_distributed."""
    if groups is not None and groups.comm.watch is not None:
        groups.comm.watch.close()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
