"""What one worker process does: join the job, build everything, train, report."""

import os
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from msa_train.checkpoint.data_record import handed_on, record_of
from msa_train.checkpoint.store import CheckpointStore
from msa_train.config import (
    Device,
    EngineKind,
    RunConfig,
    plan_stages,
    printable,
    resolve_engine,
    total_steps,
)
from msa_train.data import load_datasets
from msa_train.parallel.comm.fault_watch import FaultWatch, watched
from msa_train.parallel.comm.job import init_distributed, start_watch
from msa_train.parallel.process_groups import Groups, build_groups, destroy_groups
from msa_train.runtime import preemption
from msa_train.runtime.last_words import end_by
from msa_train.training.engines.engine import TrainEngine
from msa_train.training.engines.megatron_engine import MegatronEngine
from msa_train.training.engines.torch_engine import TorchEngine
from msa_train.training.metrics.progress import Progress
from msa_train.training.metrics.run_summary import report
from msa_train.training.metrics.writer import MetricsWriter
from msa_train.training.resume import resume
from msa_train.training.trainer import Data, Reporting, Trainer


def run_worker(config: RunConfig) -> None:
    """Train as one rank of the job that RANK, LOCAL_RANK, WORLD_SIZE and MASTER_* describe."""
    torch.set_num_threads(config.launcher.threads_per_process)
    device = choose_device(config)
    init_distributed(device=device, timeout_s=config.launcher.timeout_s, say=_warn)
    watch = start_watch(config.launcher.timeout_s, end_by)
    try:
        _work(config, device, watch)
    except Exception as error:
        ending = error if watch is None else watch.ending(error)
        if ending is error:
            raise
        raise ending from error


def _work(config: RunConfig, device: torch.device, watch: FaultWatch | None) -> None:
    with watched("set_up"):
        groups = build_groups(
            config.parallel,
            device=device,
            timeout_s=config.launcher.timeout_s,
            exchange=config.exchange,
            watch=watch,
        )
    start = time.perf_counter()
    data = load_data(config)
    check_agreement(data, groups.device)
    engine = build_engine(config, groups)
    store = CheckpointStore(config.run_dir)
    resumed = resume(config, engine)
    first_step, messages = resumed.step, resumed.messages
    reporting = _reporting(config, first_step) if groups.rank == 0 else None
    if reporting is not None:
        for line in (*_opening(config, groups, first_step), *messages):
            reporting.progress.note(line)
    trainer = Trainer(config, groups, engine, data, store, reporting)
    trainer.bad_steps.restore(resumed.bad_steps)
    last = trainer.run(first_step)
    preemption.ignore()
    if reporting is not None:
        reporting.progress.close()
        reporting.writer.close()
        if trainer.stopped is not None:
            _tell_stopped(config, trainer.stopped)
        else:
            seconds = time.perf_counter() - start
            steps = max(total_steps(config), first_step)
            report(config, groups, last, steps=steps, seconds=seconds, stream=sys.stdout)
    with watched("end"):
        dist.barrier()
    destroy_groups(groups)


def _warn(text: str) -> None:
    print(printable(f"msa-train: {text}"), file=sys.stderr, flush=True)


def _tell_stopped(config: RunConfig, stopped: preemption.StopRecord) -> None:
    state = "another start goes on from here" if stopped.saved else "nothing is saved, by checkpoint.every=0"
    print(printable(f"stopped by {stopped.signal} after step {stopped.step}: {state}"), flush=True)
    preemption.write_stopped(config.run_dir, stopped)


def load_data(config: RunConfig) -> Data:
    """Packs of every length that a stage asks for, of the corpus that the launcher has announced."""
    train, validation = {}, {}
    given = handed_on(config)
    prepared, record = given or (None, None)
    for seq_len in dict.fromkeys(stage.seq_len for stage in plan_stages(config)):
        train[seq_len], validation[seq_len], corpus = load_datasets(
            replace(config.data, seq_len=seq_len),
            block_size=config.attention.block_size,
            vocab_size=config.model.vocab_size,
            prepared=prepared,
        )
    return Data(train, validation, corpus, record or record_of(config, corpus))


def check_agreement(data: Data, device: torch.device) -> None:
    """Make sure that all ranks have the same documents. All ranks call it; 16 bytes each.

    They can differ where folders are not shared: then a rank finds no record, and what lies on its machine.

    Raises:
        ValueError: on all ranks, if one has others.
    """
    own = int(data.corpus.content, 16) >> 1
    extremes = torch.tensor([own, -own], dtype=torch.int64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, smallest = int(extremes[0]), -int(extremes[1])
    if largest != smallest:
        raise ValueError(
            f"data.corpus={data.record.corpus}: is not the same on all machines, {socket.gethostname()} has "
            f"{data.corpus.prefix}; put run_dir, data.corpus and data.cache_dir on disks that all share"
        )


def choose_device(config: RunConfig) -> torch.device:
    """The device of this worker: GPU LOCAL_RANK where GPUs are used."""
    wanted = config.launcher.device
    if wanted is Device.cuda or (wanted is Device.auto and torch.cuda.is_available()):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def build_engine(config: RunConfig, groups: Groups) -> TrainEngine:
    """The engine that the configuration asks for, with freshly drawn weights."""
    engine = resolve_engine(config, has_gpu=groups.device.type == "cuda")
    return (MegatronEngine if engine is EngineKind.megatron else TorchEngine)(config, groups)


def _reporting(config: RunConfig, first_step: int) -> Reporting:
    return Reporting(
        writer=MetricsWriter(config.run_dir, tensorboard=config.logging.tensorboard, resume_step=first_step),
        progress=Progress(config.logging.progress, total_steps(config), first_step, sys.stdout),
    )


def _opening(config: RunConfig, groups: Groups, first_step: int) -> list[str]:
    """A few lines that say what is about to run."""
    parallel = config.parallel
    where = f"{groups.world_size} x {groups.device.type} on {socket.gethostname()}"
    sizes = f"cp {parallel.cp_size}, ep {parallel.ep_size}, dp {groups.dp_size}"
    if parallel.tp_size * parallel.pp_size > 1:
        sizes += f", tp {parallel.tp_size}, pp {parallel.pp_size}"
    total, stages = total_steps(config), plan_stages(config)
    lengths = ", ".join(str(length) for length in dict.fromkeys(stage.seq_len for stage in stages))
    work = f"steps {first_step + 1} to {total} of {config.train.global_batch_size} x {lengths} tokens"
    if first_step >= total:
        work = f"nothing to do: train.steps={total} and {first_step} are made; use a larger number"
    return [f"{config.name}: {where} ({sizes}), {work}", f"run_dir {Path(config.run_dir).resolve()}"]
