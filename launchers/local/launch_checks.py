"""Check a run before any worker starts. Every failure is a ValueError of one line.

The order is that of the cost: rules between numbers first, then Triton, memory, files, the corpus. Under
torchrun and srun every rank plans the layout, and comes to the same one, for it depends on the configuration
and the number of ranks alone; rank 0 alone checks the files.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace

from launchers.cli.quick_imports import quick_imports
from launchers.local.engine_checks import check_deepspeed_here
from launchers.local.kernel_checks import (
    check_dispatcher_package,
    check_full_kernel,
    check_implementation,
    check_kernel,
)
from launchers.local.machine import expand_user
from launchers.local.memory import check_memory
from launchers.local.run_dir import check_writable
from launchers.worker import accept_fallbacks
from msa_train.config import (
    Device,
    Fusion,
    ParallelConfig,
    RunConfig,
    check_rules,
    pack_lengths,
    plan_stages,
    resolve_engine,
    total_steps,
)
from msa_train.config.model_size import model_size
from msa_train.config.pipeline import describe_layout
from msa_train.config.staging.views import check_views, layouts

# without a GPU: enough to show context parallelism on any laptop
CPU_PROCESSES = 2
# documents: one of each kind of packs, one held out
_TWO_LENGTHS = 3
# of NVIDIA's driver, of WSL, of AMD's
GPU_DEVICE_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


@dataclass(kw_only=True, slots=True)
class Layout:
    """Count the processes of a run and say where they compute."""

    world_size: int
    "ranks of the whole job"
    on_gpu: bool
    "one GPU each; else all on the CPU"


def count_gpus() -> int:
    """Count the GPUs that this process may use; torch is imported only where there can be any."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return 0
    if not any(os.path.exists(file) for file in GPU_DEVICE_FILES) and not shutil.which("nvidia-smi"):
        return 0
    # not at the top of the file: it takes seconds, and machines without a GPU need none of it here
    import torch

    return torch.cuda.device_count()


def plan_layout(
    config: RunConfig, *, joined_world_size: int | None = None, gpus_per_node: int | None = None
) -> Layout:
    """Decide number and device of the processes, and check every rule between the settings.

    The number is that of the job that was joined, else launcher.num_processes, else that of the GPUs, else 2.

    Example: 8 GPUs and no other word -> 8 ranks on GPUs. launcher.num_processes=4 on 8 GPUs -> 4 ranks.
    32 nodes of 8 tasks -> 256 ranks; with cp 8, tp 2 and pp 1 they are dp 16.

    Args:
        config: the whole run.
        joined_world_size: processes of the job that torchrun or srun started, None without one.
        gpus_per_node: of the machines that will compute, where this is not one of them.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    launcher = config.launcher
    if launcher.device is Device.cpu:
        num_gpus = 0
    else:
        num_gpus = count_gpus() if gpus_per_node is None else gpus_per_node
    if launcher.device is Device.cuda and not num_gpus:
        raise ValueError(
            "launcher.device=cuda: no GPU can be used here; use launcher.device=cpu, or check nvidia-smi, "
            "CUDA_VISIBLE_DEVICES and that torch is a CUDA build"
        )
    world_size = joined_world_size or launcher.num_processes or num_gpus or CPU_PROCESSES
    check_rules(config, world_size=world_size, has_gpu=num_gpus > 0)
    check_views(config, lambda view: check_kernel(view, on_gpu=num_gpus > 0))
    # another machine may have other libraries
    check_full_kernel(config, on_gpu=num_gpus > 0 and gpus_per_node is None)
    check_implementation(config, on_gpu=num_gpus > 0, is_here=gpus_per_node is None)
    if gpus_per_node is None:
        check_deepspeed_here(config, world_size, is_joined=joined_world_size is not None)
    check_dispatcher_package(config, on_gpu=num_gpus > 0, is_here=gpus_per_node is None)
    if joined_world_size is None and 0 < num_gpus < world_size:
        raise ValueError(
            f"launcher.num_processes={world_size}: one process per GPU and this machine has {num_gpus}; use "
            f"launcher.num_processes={num_gpus} or less, launcher.device=cpu, or more nodes with torchrun"
        )
    # a job that was joined may have its ranks on several machines, whose memory nobody knows here
    if joined_world_size is None and not num_gpus:
        check_views(config, lambda view: check_memory(view, world_size))
    return Layout(world_size=world_size, on_gpu=num_gpus > 0)


def describe(config: RunConfig, layout: Layout) -> str:
    """Write one line about the shape of a run.

    Example: run=demo on 2 processes -> "demo: 2 processes on the CPU = dp 1 x cp 2 x tp 1 x pp 1, ep 2;
    engine torch; 8192 tokens per sequence, 4096 per rank; tiny 0.8M parameters, 0.4M active".
    """
    _, first = layouts(config)[0]
    parallel, size = first.parallel, model_size(config.model, config.attention)
    return (
        f"{config.name}: {layout.world_size} processes on {'GPUs' if layout.on_gpu else 'the CPU'} = "
        f"{_sizes(parallel, layout)}; engine {resolve_engine(config, has_gpu=layout.on_gpu).value}; "
        f"{config.data.seq_len} tokens per sequence, {config.data.seq_len // parallel.cp_size} per rank; "
        f"{_stages(config)}"
        f"{config.model.name} {_count(size.total)} parameters, {_count(size.active)} active"
    )


def describe_stages(config: RunConfig, layout: Layout) -> list[str]:
    """Write a line per layout where stages have several, and the pipeline of each.

    Example: "stage long: dp 1 x cp 8 x tp 1 x pp 1, ep 8, in processes of their own from step 101 on".
    """
    found = layouts(config)
    if len(found) == 1:
        return describe_layout(found[0][1], layout.world_size)
    lines: list[str] = []
    for stages, own in found:
        names = ", ".join(stage.name for stage in stages)
        start = f"in processes of their own from step {stages[0].first_step + 1} on"
        lines.append(f"stage{'s' * (len(stages) > 1)} {names}: {_sizes(own.parallel, layout)}, {start}")
        lines += describe_layout(own, layout.world_size)
    return lines


def _sizes(parallel: ParallelConfig, layout: Layout) -> str:
    dp_size = layout.world_size // (parallel.cp_size * parallel.tp_size * parallel.pp_size)
    sizes = f"dp {dp_size} x cp {parallel.cp_size} x tp {parallel.tp_size} x pp {parallel.pp_size}"
    return f"{sizes}, ep {parallel.ep_size}"


def check_files(config: RunConfig, *, say: Callable[[str], None], hand_on: bool = False) -> None:
    """Check run_dir, the corpus and the checkpoint that the run would start from.

    The tokenized corpus is left in data.cache_dir.

    Args:
        config: the whole run.
        say: gets one line per event.
        hand_on: workers start at once and load the packs themselves: leave in run_dir, which this process
            holds, what they need to train on just this corpus. Else packs of every length that a stage asks
            for are made here too, so that no refusal is left for later.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    check_writable(config.run_dir)
    for name in ("corpus", "tokenizer", "cache_dir"):
        # where there is no home; they are expanded where they are read
        expand_user(f"data.{name}", getattr(config.data, name))
    accept_fallbacks()
    # the first imports numpy, the second torch; a mistake in the configuration need not wait for them
    with quick_imports():
        from msa_train.checkpoint import data_record
        from msa_train.checkpoint.find import find_to_resume
        from msa_train.data import load_datasets
        from msa_train.data.run_data import load_mixture, prepare_run
        from msa_train.data.stats import learning_warnings
        from msa_train.evaluation.inputs import check_inputs

    vocab_size = config.model.vocab_size
    corpus = prepare_run(config, log=say)
    _check_alternate(config, corpus.num_documents)
    for sentence in learning_warnings(config, corpus):
        say(f"warning: {sentence}")
    if not hand_on and config.data.mixture:
        load_mixture(config, corpus)[1].make_all()
    elif not hand_on:
        for seq_len in pack_lengths(config):
            data = replace(config.data, seq_len=seq_len)
            block_size = config.attention.block_size
            load_datasets(data, block_size=block_size, vocab_size=vocab_size, prepared=corpus)
    found = find_to_resume(config)
    record, messages = data_record.resume_record(config, corpus, found)
    for message in (*(found.messages if found else []), *messages):
        say(message)
    if config.evaluation.every:
        check_inputs(config, say)
    if hand_on:
        data_record.hand_on(config, corpus, record)


def _check_alternate(config: RunConfig, num_documents: int) -> None:
    """Refuse packs of two lengths in a stage where the corpus has no documents for both, one held out."""
    for name, stage in config.stages.items():
        if stage.alternate.every and num_documents < _TWO_LENGTHS:
            raise ValueError(
                f"stages.{name}.alternate.every={stage.alternate.every}: deals documents to packs of two "
                f"lengths, and data.corpus={config.data.corpus} has {num_documents}; use at least "
                f"{_TWO_LENGTHS}, or stages.{name}.alternate.every=0"
            )


def set_worker_environment(config: RunConfig, layout: Layout) -> None:
    """Set the variables that must stand before torch is imported; workers inherit them."""
    # torch would take one thread per core in every rank: 8 ranks on 64 cores would run 512
    os.environ["OMP_NUM_THREADS"] = str(config.launcher.threads_per_process)
    os.environ["MKL_NUM_THREADS"] = str(config.launcher.threads_per_process)
    # A group of gloo's would connect all of its ranks at once: 255 sockets of a rank for a group of 256. So
    # it connects those that talk: a rank of 4 has 33 sockets in place of 51, one of 2 has 27 in place of 33.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    if not layout.on_gpu and config.train.fusion is not Fusion.compile:
        # some Megatron functions compile at first use, which costs minutes on a CPU and buys nothing
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if config.launcher.device is Device.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _stages(config: RunConfig) -> str:
    """Write the stages with their steps: "stages dense_warmup 20 + sparse 100 steps; ", or nothing."""
    if not config.stages:
        return ""
    left, parts = total_steps(config), []
    for stage in plan_stages(config):
        parts.append(f"{stage.name} {min(stage.num_steps, left)}")
        left -= stage.num_steps
    return f"stages {' + '.join(parts)} steps; "


def _count(number: int) -> str:
    """Write a number of parameters: 800000 -> "0.8M", 4 * 10**11 -> "400.0B"."""
    return f"{number / 1e9:.1f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"
