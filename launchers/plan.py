"""Run msa-plan: tell before asking for GPUs what memory and time a run takes, and find layouts that fit."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from launchers.cli.command_line import Parser, number, run_command
from launchers.cli.output import say
from launchers.cli.token_count import token_count
from launchers.hydra_config.compose import compose_run
from launchers.hydra_config.options import group_options
from msa_train.config import Implementation, MoeDispatcher, RunConfig, check_rules, plan_stages
from msa_train.config.staging.views import has_layouts, layout_config, single_stage

if TYPE_CHECKING:
    from msa_train.plan.assumptions import Assumptions
    from msa_train.plan.layer_time import Machine
    from msa_train.plan.search import Plan

DESCRIPTION = """\
Counts the memory of every pipeline stage by part and the seconds of a step, for a run on GPUs that are not at
hand. With a run: that run as it is. Without one: searches the layouts of --gpus GPUs and prints the best as
settings for msa-train."""
EPILOG = """\
examples:
  msa-plan run=m3_1m                                       # does it fit, how fast would it be?
  msa-plan run=m3_1m parallel.pp_layout=even --trace       # counted on the real step, minutes
  msa-plan --gpus 256 --gpu-memory 80 --seq-len 1M model=m3
  msa-plan --gpus 128 --gpu-memory 141 --seq-len 192K --global-batch 16 model=m3"""
SEARCH_RUN = "pretrain"
"of conf/run, which a search starts from"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments, those of the process by default.

    Returns:
        Exit code: 0, 1 where the run or model does not fit, 2 for bad input, 130 if interrupted.
    """
    return run_command("msa-plan", lambda: _run(_parser().parse_intermixed_args(argv)))


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="msa-plan", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="KEY=VALUE",
        help=f"as for msa-train; runs: {', '.join(group_options('run'))}",
    )
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="GPUs of the job; with a run the fewest it needs"
    )
    parser.add_argument("--seq-len", type=token_count, metavar="N", help="tokens of a pack: 192K, 1M")
    parser.add_argument("--global-batch", type=int, metavar="N", help="packs of a step")
    parser.add_argument("--best", type=int, default=5, metavar="N", help="layouts that a search prints (5)")
    parser.add_argument(
        "--trace", action="store_true", help="with a run: count the trainer's own step and save, minutes"
    )
    parser.add_argument(
        "--stages", type=_stage_numbers, metavar="N,N", help="pipeline stages that --trace counts (all)"
    )
    parser.add_argument(
        "--of-stage", default="", metavar="NAME", help="with a run: stages.NAME (each, where layouts differ)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    given = parser.add_argument_group("what is assumed")
    given.add_argument("--cluster", default="h100", metavar="NAME", help="a preset or a file (h100)")
    given.add_argument("--rates", default="h100_assumed", metavar="NAME", help="kernel rates or a file")
    for name, (metavar, text) in ASSUMED.items():
        kind = int if name == "num_docs" else number
        given.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=text)
    return parser


def _stage_numbers(text: str) -> list[int]:
    """Read stages: "0,3" -> [0, 3]."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text}: must be numbers of stages such as 0,3")
    return sorted({int(part) for part in parts})


ASSUMED = {
    "f": ("X", "share of remote KV blocks that are selected (0.2)"),
    "imbalance": ("X", "rows of the fullest rank's experts over the mean (1.3)"),
    "num_docs": ("N", "documents of a pack (1)"),
    "gpu_memory": ("GB", "memory of a GPU (80)"),
    "context_gib": ("GIB", "CUDA context and libraries (0.6)"),
    "nccl_gib": ("GIB", "buffers of NCCL (2)"),
    "fragmentation": ("X", "share of memory lost to it (0.04)"),
    "peak_tflops": ("N", "bf16 peak that MFU is a share of (989)"),
}


def _run(arguments: argparse.Namespace) -> int:
    """Answer for a run, or search."""
    for name in ("gpus", "best", "global_batch"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}={value}: must be at least 1")
    settings = list(arguments.settings)
    searches = not any(text.startswith("run=") for text in settings)
    if searches and arguments.gpus is None:
        raise ValueError("--gpus: is needed to search; give it, or a run such as run=m3_1m")
    if searches:
        settings.insert(0, f"run={SEARCH_RUN}")
    if arguments.seq_len is not None:
        settings.append(f"data.seq_len={arguments.seq_len}")
    if arguments.global_batch is not None:
        settings.append(f"train.global_batch_size={arguments.global_batch}")
    config = compose_run(settings)
    assumed, machine = _given(arguments)
    if searches:
        return _search(arguments, settings, config, machine, assumed)
    if config.stages and (arguments.of_stage or has_layouts(config)):
        return _answer_stages(arguments, config, machine, assumed)
    return _answer(arguments, config, machine, assumed)


def _answer_stages(
    arguments: argparse.Namespace, config: RunConfig, machine: "Machine", assumed: "Assumptions"
) -> int:
    """Print memory and time of one stage of a run, or of all of them, on the same GPUs."""
    names = [stage.name for stage in plan_stages(config)]
    wanted = [arguments.of_stage] if arguments.of_stage else names
    if wanted[0] not in names:
        raise ValueError(f"--of-stage={wanted[0]}: there is no such stage; use one of {', '.join(names)}")
    if arguments.json and len(wanted) > 1:
        raise ValueError("--json: prints one plan, and the stages have several layouts; use --of-stage=NAME")
    gpus = [fewest_gpus(layout_config(config, name)) for name in names]
    arguments.gpus = arguments.gpus or math.lcm(*gpus)
    check_rules(config, world_size=arguments.gpus, has_gpu=True)
    codes: list[int] = []
    for name in wanted:
        if not arguments.json:
            say(f"stage {name}:")
        codes.append(_answer(arguments, single_stage(config, name), machine, assumed))
    return max(codes)


def _given(arguments: argparse.Namespace) -> "tuple[Assumptions, Machine]":
    """Read assumptions, cluster and rates."""
    from msa_train.plan.assumptions import Assumptions
    from msa_train.plan.layer_time import Machine
    from msa_train.simulate.inputs.cluster import load_cluster
    from msa_train.simulate.inputs.rates import load_rates

    values = {name: getattr(arguments, name) for name in ASSUMED if getattr(arguments, name) is not None}
    if "gpu_memory" in values:
        values["gpu_memory_gb"] = values.pop("gpu_memory")
    if "peak_tflops" in values:
        values["peak_flops"] = values.pop("peak_tflops") * 1e12
    assert values.keys() <= {field.name for field in fields(Assumptions)}, "options are assumptions"
    return Assumptions(**values), Machine(load_cluster(arguments.cluster), load_rates(arguments.rates))


def _answer(
    arguments: argparse.Namespace, config: RunConfig, machine: "Machine", assumed: "Assumptions"
) -> int:
    """Print memory and time of one run."""
    from msa_train.config.pipeline import resolve_layout
    from msa_train.plan.report import plan_data, plan_text, trace_lines
    from msa_train.plan.search import plan_of, timed

    world_size = arguments.gpus or fewest_gpus(config)
    check_rules(config, world_size=world_size, has_gpu=True)
    if arguments.trace:
        _check_trace(config)
    layout = resolve_layout(config, world_size)
    plan = timed(plan_of(config, world_size, layout, assumed), machine, assumed)
    data = plan_data(plan, assumed)
    if not arguments.json:
        say(plan_text(plan, assumed, machine.cluster, machine.rates), lines=True)
    peaks = [memory.peak for memory in plan.memory]
    if arguments.trace:
        traces = _traces(arguments.stages or list(range(len(peaks))), plan, assumed)
        data["traces"] = traces
        for stage, trace in traces.items():
            peaks[stage] = trace["peak_bytes"]
        if not arguments.json:
            say("\n" + "\n".join(trace_lines(traces, plan)), lines=True)
    if arguments.json:
        say(json.dumps(data, indent=1), lines=True)
    if max(peaks) <= assumed.usable_bytes:
        return 0
    say(_too_large(plan, peaks, assumed), error=True)
    return 1


def _check_trace(config: RunConfig) -> None:
    """Refuse what the traced step would need a package for that a machine without a GPU has not.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    ours = {
        "parallel.moe_dispatcher": (config.parallel.moe_dispatcher, MoeDispatcher.alltoall),
        "model.implementation": (config.model.implementation, Implementation.torch),
    }
    for name, (value, only) in ours.items():
        if value is not only:
            raise ValueError(
                f"{name}={value.value}: --trace runs the step without a GPU, where its package cannot run; "
                f"use {name}={only.value} with --trace"
            )


def _traces(stages: list[int], plan: "Plan", assumed: "Assumptions") -> dict[int, dict[str, Any]]:
    """Trace the first rank of each stage in a process of its own, one after the other."""
    from msa_train.plan.trace.assumptions import Assumptions as Traced
    from msa_train.plan.trace.assumptions import Place
    from msa_train.plan.trace.request import trace_in_child

    config, pp_size = plan.config, plan.config.parallel.pp_size
    found: dict[int, dict[str, Any]] = {}
    for stage in stages:
        if stage >= pp_size:
            raise ValueError(f"--stages={stage}: must be below parallel.pp_size={pp_size}")
        say(f"tracing stage {stage} of {pp_size} ...", error=True)
        documents = assumed.document_lengths(config.data.seq_len, config.attention.block_size)
        found[stage] = trace_in_child(
            config,
            world_size=plan.world_size,
            place=Place(pp_rank=stage),
            assumptions=Traced(
                fetched_share=assumed.f, expert_imbalance=assumed.imbalance, documents=documents
            ),
            with_save=config.checkpoint.every > 0,
        )
    return found


def _too_large(plan: "Plan", peaks: list[float], assumed: "Assumptions") -> str:
    """Say by how much a plan does not fit, and what may help."""
    stage = peaks.index(max(peaks))
    over = (max(peaks) - assumed.usable_bytes) / 2**30
    model, length = plan.config.model.name, plan.config.data.seq_len
    return (
        f"msa-plan: does not fit: stage {stage} needs {over:.1f} GiB more than GPUs of "
        f"{assumed.gpu_memory_gb:g} GB have; try msa-plan --gpus {plan.world_size} --seq-len {length} "
        f"model={model}"
    )


def _search(
    arguments: argparse.Namespace,
    settings: list[str],
    config: RunConfig,
    machine: "Machine",
    assumed: "Assumptions",
) -> int:
    """Print the best layouts of a model on a number of GPUs."""
    from msa_train.plan.report import candidates_table, overrides, plan_data, plan_text
    from msa_train.plan.search import Search

    search = Search(config, arguments.gpus, machine, assumed, say=lambda text: say(text, error=True))
    plans = search.best(arguments.best)
    if not plans:
        return _nothing_fits(arguments, search.smallest, config, machine, assumed)
    if arguments.json:
        say(json.dumps([plan_data(plan, assumed) for plan in plans], indent=1), lines=True)
        return 0
    say("\n".join(candidates_table(plans, config)), lines=True)
    say(f"\nbest: {plan_text(plans[0], assumed, machine.cluster, machine.rates)}\n", lines=True)
    for number_, plan in enumerate(plans, 1):
        say(f"{number_}. msa-train {' '.join([*settings, *overrides(plan, config)])}")
    return 0


def _nothing_fits(
    arguments: argparse.Namespace,
    smallest: "Plan | None",
    config: RunConfig,
    machine: "Machine",
    assumed: "Assumptions",
) -> int:
    """Say what is missing, and how many GPUs would do."""
    from msa_train.plan.search import Search

    if smallest is None:
        raise ValueError(
            f"--gpus={arguments.gpus}: no way to divide them is allowed by the rules; use a power of two, or "
            "another --global-batch"
        )
    over = (smallest.peak - assumed.usable_bytes) / 2**30
    say(
        f"msa-plan: nothing fits {arguments.gpus} GPUs of {assumed.gpu_memory_gb:g} GB: the smallest layout "
        f"needs {over:.1f} GiB more",
        error=True,
    )
    gpus = arguments.gpus
    while gpus < 4096:
        gpus *= 2
        if Search(config, gpus, machine, assumed).fits():
            say(f"msa-plan: {gpus} GPUs would do; see msa-plan --gpus {gpus} for how", error=True)
            break
    return 1


def fewest_gpus(config: RunConfig) -> int:
    """Return the fewest GPUs that a run's sizes allow.

    Example: pp 4, cp 16 and ep 32: a stage of 16 ranks would not hold 32 experts' ranks, so 2 x 64 = 128.
    """
    parallel = config.parallel
    unit = parallel.tp_size * parallel.pp_size * parallel.cp_size
    copies = 1
    while unit * copies // parallel.pp_size % parallel.ep_size:
        copies += 1
        if copies > parallel.ep_size:
            raise ValueError(
                f"parallel.ep_size={parallel.ep_size}: fits no number of GPUs with tp * pp * cp = {unit}"
            )
    return unit * copies


if __name__ == "__main__":
    sys.exit(main())
