"""What one worker process does: join the job, build everything, train, report."""

import os
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from msa_train.config import Device, Engine, RunConfig, resolve_engine
from msa_train.data import load_datasets
from msa_train.parallel.groups import Groups, build_groups, destroy_groups, init_distributed
from msa_train.training.checkpoint import (
    RNG_KEY,
    find_verified_checkpoint,
    load_checkpoint,
    set_rng_state,
)
from msa_train.training.checkpoint_store import CheckpointStore
from msa_train.training.engine import Engine as TrainingEngine
from msa_train.training.loop import Data, Reporting, Trainer
from msa_train.training.megatron_engine import MegatronEngine
from msa_train.training.metrics import MetricsWriter
from msa_train.training.progress import Progress
from msa_train.training.run_report import report
from msa_train.training.torch_engine import TorchEngine


def run_worker(config: RunConfig) -> None:
    """Train as one rank of the job that RANK, LOCAL_RANK, WORLD_SIZE and MASTER_* describe."""
    torch.set_num_threads(config.launcher.threads_per_process)
    device = choose_device(config)
    init_distributed(device=device, timeout_s=config.launcher.timeout_s)
    groups = build_groups(config.parallel, device=device, timeout_s=config.launcher.timeout_s)
    start = time.perf_counter()
    train, validation, corpus = load_datasets(
        config.data, block_size=config.attention.block_size, vocab_size=config.model.vocab_size
    )
    engine = build_engine(config, groups)
    store = CheckpointStore(config.run_dir)
    first_step, messages = resume(config, engine)
    reporting = _reporting(config, first_step) if groups.rank == 0 else None
    if reporting is not None:
        for line in (*_opening(config, groups, first_step), *messages):
            reporting.progress.note(line)
    trainer = Trainer(config, groups, engine, Data(train, validation, corpus), store, reporting)
    last = trainer.run(first_step)
    if reporting is not None:
        reporting.progress.close()
        reporting.writer.close()
        seconds = time.perf_counter() - start
        steps = max(config.train.steps, first_step)
        report(config, groups, last, steps=steps, seconds=seconds, stream=sys.stdout)
    dist.barrier()
    destroy_groups()


def choose_device(config: RunConfig) -> torch.device:
    """The device of this worker: GPU LOCAL_RANK where GPUs are used."""
    wanted = config.launcher.device
    if wanted is Device.cuda or (wanted is Device.auto and torch.cuda.is_available()):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def build_engine(config: RunConfig, groups: Groups) -> TrainingEngine:
    """The engine that the configuration asks for, with freshly drawn weights."""
    engine = resolve_engine(config, has_gpu=groups.device.type == "cuda")
    return (MegatronEngine if engine is Engine.megatron else TorchEngine)(config, groups)


def resume(config: RunConfig, engine: TrainingEngine) -> tuple[int, list[str]]:
    """Load the newest undamaged checkpoint, if any: (updates already made, lines to print).

    The run's own checkpoint comes first, else `checkpoint.load`.
    """
    found = find_verified_checkpoint(config)
    if found is None:
        return 0, []
    state = load_checkpoint(found.path, engine.sharded_state(loading=True))
    engine.load_state(state, found.step)
    if RNG_KEY in state:
        set_rng_state(state[RNG_KEY])
    origin = "" if found.own else f" of {found.path}"
    return found.step, [*found.messages, f"going on from step {found.step}{origin}"]


def _reporting(config: RunConfig, first_step: int) -> Reporting:
    return Reporting(
        writer=MetricsWriter(config.run_dir, tensorboard=config.logging.tensorboard, resume_step=first_step),
        progress=Progress(config.logging.progress, config.train.steps, first_step, sys.stdout),
    )


def _opening(config: RunConfig, groups: Groups, first_step: int) -> list[str]:
    """A few lines that say what is about to run."""
    parallel = config.parallel
    where = f"{groups.world_size} x {groups.device.type} on {socket.gethostname()}"
    sizes = f"cp {parallel.cp_size}, ep {parallel.ep_size}, dp {groups.dp_size}"
    if parallel.tp_size * parallel.pp_size > 1:
        sizes += f", tp {parallel.tp_size}, pp {parallel.pp_size}"
    work = (
        f"steps {first_step + 1} to {config.train.steps} "
        f"of {config.train.global_batch_size} x {config.data.seq_len} tokens"
    )
    if first_step >= config.train.steps:
        work = (
            f"nothing to do: train.steps={config.train.steps} and {first_step} are made; use a larger number"
        )
    return [f"{config.name}: {where} ({sizes}), {work}", f"run_dir {Path(config.run_dir).resolve()}"]
