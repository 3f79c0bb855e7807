"""Run one worker process: join the job, build everything, train, report.

The launcher starts one process per GPU (or CPU rank) and calls `run_worker` in each, with the same
configuration. Each of them does the following, and where it says "all ranks" they wait for each other:

    init_distributed     all ranks   torch.distributed, one group of all ranks
    start_watch                      names missing ranks, and ends this process when one is lost
    own_layout           all ranks   the layout of the stage that is to be trained
    build_groups         all ranks   process groups: tp, pp, cp, dp, ep and those of the key/value exchange
    load_data                        packs of the corpus that run_dir/data.json announces
    check_agreement      all ranks   everybody has the same documents
    build_engine         all ranks   model with fresh weights, gradient buffers, optimizer
    resume               all ranks   the newest sound checkpoint into the engine, if any
    Trainer.run          all ranks   the steps, see `trainer`
    report                           rank 0: summary.json and a table
    barrier              all ranks   nobody leaves while another is still at work

An error ends this process. The other ranks' watches hear of it, and say which rank failed and why.
"""

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from msa_kernels.full_attention.choice import describe_choice

from msa_train.checkpoint.all_ranks import run_on_all_ranks
from msa_train.checkpoint.data_record import handed_on, record_of
from msa_train.checkpoint.find import select_checkpoint
from msa_train.checkpoint.store import CheckpointStore
from msa_train.config import (
    AttentionKind,
    Device,
    EngineKind,
    RunConfig,
    Stage,
    pack_lengths,
    plan_stages,
    printable,
    resolve_engine,
    stage_at,
    total_steps,
)
from msa_train.config.staging.views import has_layouts, layout_config
from msa_train.data import load_datasets
from msa_train.data.run_data import load_mixture
from msa_train.model.transformer_config import DTYPES
from msa_train.parallel.comm.fault_watch import FaultWatch, watched
from msa_train.parallel.comm.job import init_distributed, start_watch
from msa_train.parallel.process_groups import Groups, build_groups, destroy_groups
from msa_train.runtime import preemption
from msa_train.runtime.determinism import choose_deterministic
from msa_train.runtime.fencing import own_token
from msa_train.runtime.last_words import end_by
from msa_train.runtime.next_stage import NextStage, asked_stage, write_next
from msa_train.training.engines.deepspeed_engine import DeepSpeedEngine
from msa_train.training.engines.engine import TrainEngine
from msa_train.training.engines.megatron_engine import MegatronEngine
from msa_train.training.engines.torch_engine import TorchEngine
from msa_train.training.evaluation_hook import evaluation_hook
from msa_train.training.metrics.progress import Progress
from msa_train.training.metrics.run_summary import report
from msa_train.training.metrics.writer import MetricsWriter
from msa_train.training.resume import resume
from msa_train.training.trainer import Data, Reporting, Trainer

Work = Callable[[RunConfig, torch.device, FaultWatch | None], bool]
"what a rank does once it has joined the job; tells whether the run goes on in other processes"


def run_worker(config: RunConfig) -> bool:
    """Train as one rank of the job, see `run_as_rank`."""
    return run_as_rank(config, _work)


def run_as_rank(config: RunConfig, work: Work) -> bool:
    """Do something as one rank of the job that RANK, LOCAL_RANK, WORLD_SIZE and MASTER_* describe.

    Returns:
        Whether the run goes on in processes of another layout, see `runtime.next_stage`.

    Raises:
        Exception: whatever ends the run. Where another rank failed first, an error that names it, since an
            error of this rank's collectives would name nobody.
    """
    torch.set_num_threads(config.launcher.threads_per_process)
    if config.train.deterministic:
        # before CUDA and NCCL start, which read variables once
        choose_deterministic()
    device = choose_device(config)
    init_distributed(device=device, timeout_s=config.launcher.timeout_s, say=_warn)
    watch = start_watch(config.launcher.timeout_s, end_by)
    try:
        return work(config, device, watch)
    except Exception as error:
        # Where another rank failed, this one's error is a broken connection; the watch knows the true cause.
        ending = error if watch is None else watch.ending(error)
        if ending is error:
            raise
        raise ending from error


def _work(config: RunConfig, device: torch.device, watch: FaultWatch | None) -> bool:
    """Build everything, train and report; see the module for the order. Tells whether the run goes on."""
    with built_groups(config, device, watch, own_layout) as (config, groups):
        start = time.perf_counter()
        data = load_data(config)
        check_agreement(data, groups.device)
        engine = build_engine(config, groups)
        # however it ends
        with closing(engine):
            return _train(config, groups, engine, data, start)


@contextmanager
def built_groups(
    config: RunConfig,
    device: torch.device,
    watch: FaultWatch | None,
    choose_layout: Callable[[RunConfig], RunConfig],
) -> Iterator[tuple[RunConfig, Groups]]:
    """Build process groups for the block, with the configuration of the layout; all ranks leave together.

    After an error nobody waits and nothing is destroyed: the process ends.
    """
    with watched("set_up"):
        config = choose_layout(config)
        groups = build_groups(
            config.parallel,
            device=device,
            timeout_s=config.launcher.timeout_s,
            exchange=config.exchange,
            watch=watch,
        )
    yield config, groups
    # A process that ended while others still wrote would look like a lost rank to them.
    with watched("end"):
        dist.barrier()
    destroy_groups(groups)


def _train(config: RunConfig, groups: Groups, engine: TrainEngine, data: Data, start: float) -> bool:
    """Go on from where the run stands, train and report; tells whether the run goes on in other processes.

    `start`: when this process began.
    """
    store = CheckpointStore(config.run_dir)
    resumed = resume(config, engine)
    first_step, messages = resumed.step, resumed.messages
    # not before the first step is known: metrics of later steps are dropped, as they come again
    reporting = _reporting(config, first_step) if groups.rank == 0 else None
    if reporting is not None:
        for line in (*_opening(config, groups, first_step), *messages):
            reporting.progress.note(line)
    trainer = Trainer(config, groups, engine, data, store, reporting)
    # before the first step: which packs it has depends on what was passed over
    trainer.bad_steps.restore(resumed.bad_steps)
    trainer.between = evaluation_hook(config, engine, data, reporting, first_step)
    last = trainer.run(first_step)
    # everything is saved; a signal now must not cut the report short
    preemption.ignore()
    if reporting is not None:
        reporting.progress.close()
        reporting.writer.close()
        if trainer.stopped is not None:
            _tell_stopped(config, trainer.stopped)
        elif trainer.next_stage is not None:
            _tell_next(config, trainer.next_stage, first_step)
        else:
            seconds = time.perf_counter() - start
            steps = max(total_steps(config), first_step)
            report(config, groups, last, steps=steps, seconds=seconds, stream=sys.stdout)
    return trainer.next_stage is not None


def own_layout(config: RunConfig) -> RunConfig:
    """Return the configuration of processes for the stage that they are to train. All ranks call it.

    Where stages differ in their layout and nobody has said which it is, rank 0 looks for the step of the
    newest checkpoint; one exchange of a name.
    """
    plan = plan_stages(config)
    name = asked_stage()
    if not has_layouts(config):
        name = plan[0].name
    elif all(stage.name != name for stage in plan):
        name = run_on_all_ranks(lambda: _stage_to_train(config) if dist.get_rank() == 0 else "", None)[0]
    return layout_config(config, name)


def _stage_to_train(config: RunConfig) -> str:
    """Name the stage of the step that a start goes on with; the first one where nothing can be used."""
    try:
        found = select_checkpoint(config, full=False)
    except ValueError:
        # said when the checkpoint is to be loaded
        found = None
    step = 0 if found is None or found.weights_only else found.step
    return stage_at(plan_stages(config), step).name


def _tell_next(config: RunConfig, stage: Stage, first_step: int) -> None:
    """Say that processes of another layout go on, and leave next_stage.json for who starts them."""
    step = max(stage.first_step, first_step)
    print(printable(f"step {step} is saved: stage {stage.name} goes on in processes of its own"), flush=True)
    write_next(config.run_dir, NextStage(step=step, stage=stage.name, generation=own_token()))


def _warn(text: str) -> None:
    """Print a line on stderr."""
    print(printable(f"msa-train: {text}"), file=sys.stderr, flush=True)


def _tell_stopped(config: RunConfig, stopped: preemption.StopRecord) -> None:
    """Say that a signal ended the run, and leave stopped.json for whoever starts it again."""
    state = "another start goes on from here" if stopped.saved else "nothing is saved, by checkpoint.every=0"
    print(printable(f"stopped by {stopped.signal} after step {stopped.step}: {state}"), flush=True)
    preemption.write_stopped(config.run_dir, stopped)


def load_data(config: RunConfig) -> Data:
    """Load the packs of every length that a stage asks for, of the corpus that the launcher has announced.

    Without an announcement, as in tests, the corpus is prepared here.

    Raises:
        ValueError: if data.json is damaged, or the corpus cannot be used.
    """
    train, validation = {}, {}
    given = handed_on(config)
    prepared, record = given or (None, None)
    if config.data.mixture:
        corpus, mixed = load_mixture(config, prepared)
        return Data({}, mixed.validations(), corpus, record or record_of(config, corpus), mixed)
    for seq_len in pack_lengths(config):
        train[seq_len], validation[seq_len], corpus = load_datasets(
            replace(config.data, seq_len=seq_len),
            block_size=config.attention.block_size,
            vocab_size=config.model.vocab_size,
            prepared=prepared,
        )
    return Data(train, validation, corpus, record or record_of(config, corpus))


def check_agreement(data: Data, device: torch.device) -> None:
    """Make sure that all ranks have the same documents. All ranks call it; 16 bytes each.

    The largest of x and the largest of -x come from one all-reduce; the latter is the smallest, negated.
    Example: 7, 7 and 5 -> 7 and -5, so the smallest is 5 and the ranks differ.

    They can differ where folders are not shared: then a rank finds no record, and what lies on its machine.

    Raises:
        ValueError: on all ranks, if one has others.
    """
    # a bit less than the 64 of the checksum, so that it fits into int64 with its sign
    own = int(data.corpus.content, 16) >> 1
    extremes = torch.tensor([own, -own], dtype=torch.int64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, smallest = int(extremes[0]), -int(extremes[1])
    if largest != smallest:
        raise ValueError(
            f"data.corpus={data.record.corpus}: is not the same on all machines, {socket.gethostname()} has "
            f"{data.corpus.prefix or data.corpus.description}; put run_dir, data.corpus and data.cache_dir "
            "on disks that all share"
        )


def choose_device(config: RunConfig) -> torch.device:
    """Choose the device of this worker: GPU LOCAL_RANK where GPUs are used, else the CPU."""
    wanted = config.launcher.device
    if wanted is Device.cuda or (wanted is Device.auto and torch.cuda.is_available()):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def build_engine(config: RunConfig, groups: Groups) -> TrainEngine:
    """Build the engine that the configuration asks for, with freshly drawn weights."""
    kind = resolve_engine(config, has_gpu=groups.device.type == "cuda")
    if kind is EngineKind.deepspeed:
        engine = DeepSpeedEngine(config, groups)
        if groups.rank == 0:
            engine.write_json(Path(config.run_dir))
        return engine
    return (MegatronEngine if kind is EngineKind.megatron else TorchEngine)(config, groups)


def _reporting(config: RunConfig, first_step: int) -> Reporting:
    """Open metrics and terminal of rank 0; drops metrics of steps after `first_step`, which come again."""
    return Reporting(
        writer=MetricsWriter(config.run_dir, tensorboard=config.logging.tensorboard, resume_step=first_step),
        progress=Progress(config.logging.progress, total_steps(config), first_step, sys.stdout),
    )


def _step_sizes(stages: Sequence[Stage]) -> str:
    """Write packs and lengths of the stages' steps: "2 x 256, 512", or "2 x 256, 1 x 512"."""
    if len({stage.global_batch_size for stage in stages}) == 1:
        lengths = dict.fromkeys(stage.seq_len for stage in stages)
        return f"{stages[0].global_batch_size} x {', '.join(map(str, lengths))}"
    return ", ".join(dict.fromkeys(f"{stage.global_batch_size} x {stage.seq_len}" for stage in stages))


def _opening(config: RunConfig, groups: Groups, first_step: int) -> list[str]:
    """Say in a few lines what is about to run."""
    parallel = config.parallel
    where = f"{groups.world_size} x {groups.device.type} on {socket.gethostname()}"
    sizes = f"cp {parallel.cp_size}, ep {parallel.ep_size}, dp {groups.dp_size}"
    if parallel.tp_size * parallel.pp_size > 1:
        sizes += f", tp {parallel.tp_size}, pp {parallel.pp_size}"
    total, stages = total_steps(config), plan_stages(config)
    work = f"steps {first_step + 1} to {total} of {_step_sizes(stages)} tokens"
    if first_step >= total:
        work = f"nothing to do: train.steps={total} and {first_step} are made; use a larger number"
    lines = [f"{config.name}: {where} ({sizes}), {work}", f"run_dir {Path(config.run_dir).resolve()}"]
    if groups.device.type == "cuda" and AttentionKind.full in config.model.attention_kinds():
        dtype = DTYPES[config.train.precision]
        kernel = config.attention.full_kernel.value
        lines.append(describe_choice(kernel, groups.device, dtype, config.model.head_dim))
    return lines
