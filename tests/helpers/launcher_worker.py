"""A small stand-in for training: all-reduces over gloo, and misbehaves as TEST_WORKER says."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from msa_train.config import RunConfig
from msa_train.parallel.fault_watch import watched
from msa_train.parallel.groups import init_distributed, start_watch
from msa_train.training import stop
from msa_train.training.last_words import end_by

FAIL_AT_STEP = 3


def run(config: RunConfig) -> None:
    """All-reduce for train.steps steps; rank 1 does as TEST_WORKER says, see `_misbehave`.

    Asked to stop, it saves nothing.
    """
    init_distributed(device=torch.device("cpu"), timeout_s=config.launcher.timeout_s)
    watch = start_watch(config.launcher.timeout_s, end_by)
    assert watch is not None, "there are several ranks"
    rank, behaviour = dist.get_rank(), os.environ.get("TEST_WORKER", "")
    run_dir = Path(config.run_dir)
    (run_dir / f"pid{rank}").write_text(str(os.getpid()))
    print(f"rank {rank} starts; terminal: {sys.stdout.isatty()}", flush=True)
    for step in range(config.train.steps):
        if rank == 1 and step == FAIL_AT_STEP:
            _misbehave(behaviour)
        with watched("step"):
            dist.all_reduce(torch.ones(100_000))
        asked = torch.tensor([stop.requested()])
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        if asked.item():
            name = signal.Signals(int(asked)).name
            if rank == 0:
                stop.write_stopped(run_dir, stop.Stopped(step=step, signal=name, saved=False, generation=""))
            dist.barrier()
            break
        (run_dir / f"step{rank}").write_text(str(step))
        time.sleep(0.01)
    watch.close()
    dist.destroy_process_group()
    print(f"rank {rank} ends", flush=True)


def _misbehave(behaviour: str) -> None:
    if behaviour == "raise":
        raise RuntimeError("the loss of rank 1 is not finite")
    if behaviour == "full disk":
        os.environ["TORCHELASTIC_ERROR_FILE"] = "/dev/full/rank1.error.json"
        raise RuntimeError("the loss of rank 1 is not finite")
    if behaviour == "exit":
        print("rank 1 leaves without a word", file=sys.stderr, flush=True)
        os._exit(7)
    if behaviour == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if behaviour == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
