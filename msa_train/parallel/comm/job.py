"""Join the job that this process is a rank of, and watch the other ranks; needs nothing of Megatron."""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from msa_train.parallel.comm.fault_watch import FaultWatch
from msa_train.parallel.comm.job_store import open_store
from msa_train.parallel.comm.rank_faults import BEAT_S, GRACE_S, ExchangeError

# Seconds by which NCCL's own limit is later than ours: it ends the process without naming anyone.
NCCL_SPARE_S = BEAT_S + GRACE_S


def init_distributed(
    *, device: torch.device, timeout_s: int, say: Callable[[str], None] = lambda text: None
) -> None:
    """Join the job that the environment describes (see `open_store`); nccl on GPUs, else gloo.

    Args:
        device: of this rank.
        timeout_s: longest wait for the other ranks, and of a collective, in seconds.
        say: is told for whom this rank waits, if that takes long.

    Raises:
        JobIncompleteError: if not all ranks come in time.
    """
    if dist.is_initialized():
        return
    # gloo carries the same collectives on CPUs, so that all of it is tested without a GPU.
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        store=open_store(os.environ, timeout_s=timeout_s, say=say),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=limit_s(device, timeout_s)),
    )


def start_watch(timeout_s: float, give_up: Callable[[ExchangeError], None]) -> FaultWatch | None:
    """Watch all ranks of the initialised world from now on; None where this rank is alone.

    Args:
        timeout_s: longest silence of a rank, in seconds.
        give_up: called by a thread when a rank is lost, to end this process wherever it stands.
    """
    world_size = dist.get_world_size()
    if world_size == 1:
        return None
    watch = FaultWatch(
        _get_default_store(), range(world_size), dist.get_rank(), timeout_s=timeout_s, give_up=give_up
    )
    watch.start()
    watch.make_current()
    return watch


def limit_s(device: torch.device, timeout_s: float) -> float:
    """Find the seconds after which a collective ends by itself: with NCCL later than the watch."""
    return timeout_s + (NCCL_SPARE_S if device.type == "cuda" else 0.0)
