"""Start Megatron's process groups. The one place that reads Megatron's globals."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from msa_train.config import ExchangeConfig, ParallelConfig
from msa_train.parallel.comm.cp_groups import CpGroups
from msa_train.parallel.comm.fault_watch import FaultWatch
from msa_train.parallel.comm.job import limit_s
from msa_train.parallel.comm.topology import build_comm


@dataclass(slots=True)
class Groups:
    """Hold this rank's place in the world.

    Example: 8 ranks with cp_size 2, ep_size 4, no tensor or pipeline parallelism: rank 5 has cp_rank 1,
    dp_rank 2 and ep_rank 1; its groups are cp (4, 5), dp (1, 3, 5, 7), ep (4, 5, 6, 7) and expert_dp (1, 5).
    """

    collection: ProcessGroupCollection
    "the same groups as Megatron's modules take them"
    device: torch.device
    "of this rank's tensors"
    rank: int
    "in the job"
    world_size: int
    "ranks of the job"
    tp_rank: int
    "tensor-parallel rank"
    tp_size: int
    "ranks that share one layer's weights"
    pp_rank: int
    "pipeline stage"
    pp_size: int
    "pipeline stages"
    cp_rank: int
    "context-parallel rank"
    cp_size: int
    "ranks that share a sequence"
    dp_rank: int
    "data-parallel rank"
    dp_size: int
    "sequences that are trained on at a time"
    ep_rank: int
    "expert-parallel rank"
    ep_size: int
    "ranks that share a layer's experts"
    cp: dist.ProcessGroup
    "ranks that share a sequence"
    dp: dist.ProcessGroup
    "ranks in this one's place of all sequences"
    dp_cp: dist.ProcessGroup
    "ranks that hold the same parameters, experts apart; gradients of these are summed here"
    ep: dist.ProcessGroup
    "ranks that share a layer's experts"
    expert_dp: dist.ProcessGroup
    "ranks that hold the same experts; gradients of these are summed here"
    model_parallel: dist.ProcessGroup
    "ranks that hold the parts of one model (tensor and pipeline)"
    comm: CpGroups
    "context-parallel collectives, to be copied for each step"

    @property
    def is_pipeline_first_stage(self) -> bool:
        """Tell whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_pipeline_last_stage(self) -> bool:
        """Tell whether this rank computes the loss."""
        return self.pp_rank == self.pp_size - 1

    def cp_comm(self) -> CpGroups:
        """Return context-parallel collectives with counters of their own."""
        return self.comm.with_new_counters()


def build_groups(
    parallel: ParallelConfig,
    *,
    device: torch.device,
    timeout_s: int = 600,
    exchange: ExchangeConfig | None = None,
    watch: FaultWatch | None = None,
) -> Groups:
    """Create Megatron's groups over the initialised world.

    Expert parallelism spans tensor, context and data parallel ranks of a pipeline stage (Megatron's order
    tp-cp-ep-dp-pp), so ep_size may exceed the data-parallel size.

    Args:
        parallel: sizes of all kinds of parallelism.
        device: of this rank.
        timeout_s: longest wait in a collective, in seconds.
        exchange: nodes and overlap; None: the defaults.
        watch: of the job; None: one of the context-parallel group is started.

    Raises:
        ValueError: nodes that were detected do not divide the context-parallel group.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp_size,
        pipeline_model_parallel_size=parallel.pp_size,
        context_parallel_size=parallel.cp_size,
        expert_model_parallel_size=parallel.ep_size,
        # Experts are whole: tensor-parallel ranks hold different experts, not parts of them.
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
    if groups is not None and groups.comm.whole.watch is not None:
        groups.comm.whole.watch.close()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
