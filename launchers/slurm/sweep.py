"""Submit a job for every combination of values (`msa-submit -m`), by Hydra's multirun and submitit.

The login node composes and checks each combination, one after the other, and then waits for all of them. A
job has `nodes` whole nodes: 12 combinations on 32 nodes each ask for 384. The jobs are one Slurm array, with
a task per worker: every rank is a process of submitit that calls `train_job`.
"""

import importlib
import itertools
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from launchers.cli.output import say
from launchers.hydra_config.compose import compose_run, run_config, text_keys
from launchers.hydra_config.options import config_dir
from launchers.hydra_config.text_values import literal, quoted, split_choices
from launchers.local.code_path import python_path
from launchers.local.job_environment import joined_environment
from launchers.local.launch_checks import check_files, describe, plan_layout, set_worker_environment
from launchers.local.run_dir import claim_run_dir, write_config
from launchers.worker import run_entry
from msa_train.config import ClusterConfig, check_time
from msa_train.training.metrics.tables import format_table
from msa_train.training.metrics.writer import read_metrics

if TYPE_CHECKING:
    from launchers.slurm.submission import Request

# rank 0 of a run of one process; nobody else has to find it
_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def submit_sweep(request: "Request", cluster: ClusterConfig) -> None:
    """Check every combination, submit all of them as one array, wait, print their last losses.

    Each run has its own folder, RUN_DIR/KEY=VALUE, where RUN_DIR is the one of a single run.

    Raises:
        ValueError: one line, if a combination is refused or the launcher is not installed.
    """
    try:
        importlib.import_module("hydra_plugins.hydra_submitit_launcher")
    except ModuleNotFoundError:
        raise ValueError("-m: needs hydra-submitit-launcher; pip install 'msa-train[slurm]'") from None
    if cluster.container:
        raise ValueError("-m: the submitit launcher starts no containers; use a cluster with cluster.venv")
    swept, combinations = expand(request.run)
    for overrides in combinations:
        config = compose_run(overrides, request.config_dirs)
        layout = plan_layout(
            config,
            joined_world_size=request.nodes * cluster.workers,
            gpus_per_node=cluster.gpus_per_node,
        )
        say(f"{', '.join(text for text in overrides if _key(text) in swept)}: {describe(config, layout)}")
        if not request.dry_run:
            check_files(config, say=say)
    base = Path(compose_run(combinations[0], request.config_dirs).run_dir).absolute()
    arguments = hydra_arguments(request, cluster, base, swept)
    if request.dry_run:
        say("\n".join(arguments), lines=True)
        return
    sys.stdout.flush()
    # Hydra's entry point takes nothing but the command line
    sys.argv = ["msa-submit", "--multirun", *arguments]
    hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")(train_job)()
    say(_results(base), lines=True)


def expand(overrides: Sequence[str]) -> tuple[set[str], list[list[str]]]:
    """Find the keys with several values, and write the overrides of every combination.

    Example: ["run=smoke", "optim.lr=1e-4,3e-4"] -> {"optim.lr"} and [["run=smoke", "optim.lr=1e-4"],
    ["run=smoke", "optim.lr=3e-4"]].

    Raises:
        ValueError: if something cannot be read, or nothing has several values.
    """
    swept: set[str] = set()
    choices: list[list[str]] = []
    for text in overrides:
        # text is split here, since Hydra's grammar would read name=2024_01,2024_02 as numbers
        if _key(text) in text_keys():
            values = split_choices(text.partition("=")[2])
            swept |= {_key(text)} if len(values) > 1 else set()
            choices.append([f"{_key(text)}={value}" for value in values] if len(values) > 1 else [text])
            continue
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException:
            raise ValueError(f"{text}: cannot be read as key=value or key=value,value") from None
        if override.is_sweep_override():
            swept.add(_key(text))
            choices.append([f"{_key(text)}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([text])
    if not swept:
        raise ValueError(
            "-m: no key has several values; write them as in optim.lr=1e-4,3e-4, or leave -m out"
        )
    return swept, [list(combination) for combination in itertools.product(*choices)]


def hydra_arguments(request: "Request", cluster: ClusterConfig, base: Path, swept: set[str]) -> list[str]:
    """Write what Hydra is told: the overrides, where runs go, and how Slurm is asked.

    Args:
        request: the command line.
        cluster: with its overrides.
        base: folder of the sweep, absolute.
        swept: keys with several values, which name the folders of the runs.
    """
    # what is the same in all runs does not belong into the names of their folders
    fixed = sorted({_key(text) for text in request.run} - swept | {"run_dir"})
    setup = ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK", *cluster.setup]
    # what lies in the folder of the command is not imported
    safe = {"PYTHONSAFEPATH": "1", "PYTHONPATH": python_path(os.environ.get("PYTHONPATH", ""))}
    variables = {**safe, **cluster.environment, **cluster.network}
    setup += [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    more: dict[str, str] = {}
    for option in cluster.sbatch:
        name, _, value = option.lstrip("-").partition("=")
        more[name] = value
    if cluster.memory:
        more["mem"] = cluster.memory
    # None: an option that is not given to sbatch, so that the site's default holds
    launcher: dict[str, Any] = {
        "nodes": request.nodes,
        "tasks_per_node": cluster.workers,
        "cpus_per_task": cluster.cpus_per_worker,
        "gpus_per_node": cluster.gpus_per_node or None,
        "partition": cluster.partition or None,
        "account": cluster.account or None,
        "qos": cluster.qos or None,
        "timeout_min": check_time(request.time, cluster) // 60,
        "signal_delay_s": cluster.signal_lead_s,
        "max_num_timeout": cluster.max_restarts if cluster.requeue else 0,
        "setup": setup,
        "additional_parameters": more or None,
    }
    given = [_as_hydra_reads(text) for text in request.run if _key(text) != "run_dir"]
    folders = ",".join(quoted(f"file://{folder.absolute()}") for folder in request.config_dirs)
    return [
        *given,
        *([f"hydra.searchpath=[{folders}]"] if folders else []),
        "hydra/launcher=submitit_slurm",
        *(f"hydra.launcher.{key}={_literal(value)}" for key, value in launcher.items() if value is not None),
        f"hydra.sweep.dir={_literal(str(base))}",
        "hydra.sweep.subdir=${hydra.job.override_dirname}",
        f"hydra.job.config.override_dirname.exclude_keys={_literal(fixed)}",
        "run_dir=${hydra:sweep.dir}/${hydra:sweep.subdir}",
        "hydra.output_subdir=null",
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]


def train_job(node: Any) -> None:
    """Run one process of one run; started by submitit, one for each worker.

    Args:
        node: what Hydra has composed for this run, not resolved yet.
    """
    # names the folder of the sweep, which Hydra knows and the other keys do not
    node.run_dir = str(node.run_dir)
    config = run_config(node)
    job = joined_environment(os.environ) or _ALONE
    layout = plan_layout(config, joined_world_size=int(job["WORLD_SIZE"]))
    set_worker_environment(config, layout)
    os.environ.update(job)
    if job["RANK"] == "0":
        with claim_run_dir(config.run_dir):
            say(describe(config, layout))
            check_files(config, say=say, hand_on=True)
            write_config(config)
            run_entry(config)
    else:
        run_entry(config)


def _results(base: Path) -> str:
    """List the last loss of every run under the folder of the sweep."""
    rows = []
    for path in sorted(base.glob("*/config.yaml")):
        metrics = read_metrics(path.parent) if (path.parent / "metrics.jsonl").exists() else []
        last = metrics[-1] if metrics else {}
        told = f"step {last['step']}, lm_loss {last['lm_loss']:.4g}" if last.get("lm_loss") else "no step"
        rows.append((str(path.parent), told))
    return format_table(rows)


def _key(text: str) -> str:
    """Take the key of an override: "+optim.lr=1e-4" -> "optim.lr"."""
    return text.partition("=")[0].lstrip("+")


def _as_hydra_reads(text: str) -> str:
    """Write an override so that Hydra keeps its value, or all its values, as they were written.

    Example: name=2024_01,"a b" -> name="2024_01","a b"; optim.lr=1e-4,3e-4 stays.
    """
    key, value = _key(text), text.partition("=")[2]
    if key not in text_keys():
        return text.lstrip("+")
    return f"{key}=" + ",".join(_plain_or_quoted(part) for part in split_choices(value))


def _plain_or_quoted(value: str) -> str:
    """Leave out the quotes where Hydra reads the value as it is: values become names of folders."""
    try:
        is_plain = OverridesParser.create().parse_override(f"key={value}").value() == value
    except HydraException:
        is_plain = False
    return value if is_plain else literal(f"key={value}").partition("=")[2]


def _literal(value: Any) -> str:
    """Write a value for Hydra's grammar.

    Example: {"mem": "64G", "n": [1, 2]} -> {mem:"64G",n:[1, 2]}.
    """
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return quoted(value) if isinstance(value, str) else str(value)
