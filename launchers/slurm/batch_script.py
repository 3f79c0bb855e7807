"""Write the batch script of a job: head and settings from a cluster's file, the rest from slurm/train.sbatch.

Three readers take the text apart in ways of their own, hence three ways of quoting: sbatch reads the lines
#SBATCH (`quote`), Slurm replaces %j and such in --output (`output_pattern`), bash reads all else (shlex).
"""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from launchers.hydra_config.options import shipped_file
from launchers.local.code_path import python_path
from msa_train.config import ClusterConfig, ContainerRuntime, Tasks

_NEEDS_QUOTES = re.compile(r"""[\s#"'\\]""")
# the line of slurm/train.sbatch below which nothing depends on the job
COMMON = "# === The same in every job from here on.\n"


@dataclass(kw_only=True, slots=True)
class Job:
    """Describe what is to be submitted."""

    name: str
    "of the job in Slurm's lists: that of the run"
    run_dir: Path
    "absolute"
    folder: Path
    "where the command was given: relative paths in the arguments begin here"
    nodes: int
    "number of whole nodes"
    time: str
    "limit of one start, as Slurm writes it: HH:MM:SS or D-HH:MM:SS"
    arguments: list[str]
    "of msa-train, not quoted"
    python_path: str
    "PYTHONPATH of the command, empty where the package is installed"


def script_path() -> Path:
    """Find the script that works by hand, slurm/train.sbatch."""
    return shipped_file("slurm/train.sbatch")


def batch_script(job: Job, cluster: ClusterConfig) -> str:
    """Write the text of the script, complete: `sbatch FILE` submits it.

    Everything is in it, so that what ran can be read in run_dir years later, and submitted again.

    Raises:
        ValueError: if a folder cannot be written for sbatch or for a container.
    """
    _, marker, common = script_path().read_text(encoding="utf-8").partition(COMMON)
    assert marker, f"{script_path()} lacks the line {COMMON.strip()!r}"
    lines = [
        "#!/usr/bin/env bash",
        f"# Trains {job.name}; written by msa-submit, to be read, changed, submitted:",
    ]
    lines += ["#", f"#   sbatch {shlex.quote(str(job.run_dir / 'slurm' / 'job.sbatch'))}", "#"]
    lines += [f"#SBATCH {option}" for option in sbatch_options(job, cluster)]
    lines += _environment(job, cluster) + _settings(job, cluster)
    return "\n".join(lines) + "\n\n" + COMMON + common


def quote(value: str) -> str:
    """Quote a value for the head of the script, where a blank ends it and a # begins a comment.

    Not shlex.quote: sbatch reads these lines itself, and no shell does. Inside its double quotes a backslash
    escapes, and a $ is a $.

    Example: my job -> "my job"; a#b -> "a#b"; say "x" -> "say \\"x\\""; h100 -> h100.
    """
    if not _NEEDS_QUOTES.search(value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _quote_option(option: str) -> str:
    """Quote an option from a cluster's file; one in which quotes are written already stays as it is.

    Example: --comment=a b -> --comment="a b"; --comment="a b" and --exclusive stay.
    """
    name, equals, value = option.partition("=")
    if not equals or re.search(r"""[\s"'\\]""", name) or re.search(r"""["'\\]""", value):
        return option
    return f"{name}={quote(value)}"


def output_pattern(folder: Path) -> str:
    """Write the file of a job's output, in which Slurm replaces %j, and nothing else.

    Example: /data/50%/slurm -> /data/50%%/slurm/job-%j.out.

    Raises:
        ValueError: where Slurm has no way to write the folder's name.
    """
    if "\\" in str(folder):
        raise ValueError(f"run_dir={folder.parent}: Slurm drops every \\ of it; use a folder without one")
    return f"{str(folder).replace('%', '%%')}/job-%j.out"


def sbatch_options(job: Job, cluster: ClusterConfig) -> list[str]:
    """List the options of sbatch, one per line of the head.

    Example: 8 workers of 8 CPUs each, tasks=node -> --ntasks-per-node=1, --cpus-per-task=64; tasks=gpu ->
    --ntasks-per-node=8, --cpus-per-task=8. On 32 nodes Slurm starts 32 or 256 tasks.
    """
    tasks, cpus = cluster.workers, cluster.cpus_per_worker
    if cluster.tasks is Tasks.node:
        tasks, cpus = 1, cpus * cluster.workers
    optional = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "mem": cluster.memory,
        "gpus-per-node": cluster.gpus_per_node or "",
    }
    return [
        f"--job-name={quote(job.name)}",
        *(f"--{name}={quote(str(value))}" for name, value in optional.items() if value != ""),
        f"--nodes={job.nodes}",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={cpus}",
        *(["--exclusive"] if cluster.exclusive else []),
        f"--time={job.time}",
        "--requeue" if cluster.requeue else "--no-requeue",
        # a requeued job has the same number: without it, its output would replace that of the last start
        "--open-mode=append",
        # B: to the batch script alone, which hands it on to the step; workers must not get it twice
        f"--signal=B:USR1@{cluster.signal_lead_s}",
        f"--output={quote(output_pattern(job.run_dir / 'slurm'))}",
        *(_quote_option(option) for option in cluster.sbatch),
    ]


def _mount(folder: Path) -> str:
    """Show a folder under its own name inside a container, as paths in the arguments name it.

    Example: /data/runs -> /data/runs:/data/runs. In a list of mounts , and : separate.
    """
    if re.search("[,:]", str(folder)):
        raise ValueError(
            f"{folder}: a folder with , or : in its name cannot be shown to a container; use another folder"
        )
    return f"{folder}:{folder}"


def _environment(job: Job, cluster: ClusterConfig) -> list[str]:
    """Write the lines of shell that go to the folder, set up the site and export variables.

    The cluster's `setup` stands as it is written, for it is shell: `module load cuda`. Values of variables
    are quoted, for they are not.
    """
    lines = [f"cd {shlex.quote(str(job.folder))} || exit 1", *cluster.setup]
    if cluster.venv and not cluster.container:
        lines.append(f"source {shlex.quote(cluster.venv)}/bin/activate")
    variables = {**cluster.environment, **cluster.network}
    own_python = not cluster.venv and not cluster.container
    # what lies in the folder of the command is not imported; a cluster's own variables win
    safe = {"PYTHONPATH": python_path(job.python_path, with_code=own_python), "PYTHONSAFEPATH": "1"}
    variables = {**{name: value for name, value in safe.items() if value}, **variables}
    return lines + [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]


def _settings(job: Job, cluster: ClusterConfig) -> list[str]:
    """Write the settings that the common part of the script reads, as assignments of bash.

    Example: arguments=(run=demo 'name=my run' run_dir=/data/runs/demo). Arrays, as they keep blanks inside an
    argument where a string would be split.
    """
    # the commands of the virtual environment or of the container; without either, this Python runs this code
    train, check = ["msa-train"], ["msa-preflight"]
    if not cluster.venv and not cluster.container:
        train, check = ([sys.executable, "-m", f"launchers.{name}"] for name in ("train", "preflight"))
    srun, inside = list(cluster.srun), []
    # what a container must see of the host
    mounts: list[str] = []
    if cluster.container:
        mounts = [_mount(folder) for folder in (job.folder, job.run_dir)] + cluster.container_mounts
    if cluster.container and cluster.container_runtime is ContainerRuntime.pyxis:
        srun += [f"--container-image={cluster.container}", f"--container-mounts={','.join(mounts)}"]
        srun.append(f"--container-workdir={job.folder}")
    elif cluster.container:
        inside = ["apptainer", "exec", *(["--nv"] if cluster.gpus_per_node else [])]
        inside += [f"--bind={mount}" for mount in mounts] + [cluster.container]
    check += [f"--gpus={cluster.gpus_per_node}", f"--cpus={cluster.cpus_per_worker * cluster.workers}"]
    if cluster.min_memory_gb:
        check.append(f"--memory-gb={cluster.min_memory_gb:g}")
    return [
        f"train=({shlex.join(train)})",
        f"preflight=({shlex.join(check) if cluster.preflight else ''})",
        f"inside=({shlex.join(inside)})",
        f"srun_options=({shlex.join(srun)})",
        f"arguments=({shlex.join(job.arguments)})",
        f"tasks={cluster.tasks.value}",
        f"workers={cluster.workers}",
        f"requeue={str(cluster.requeue).lower()}",
        f"max_restarts={cluster.max_restarts}",
        f"exclude_bad_nodes={str(cluster.exclude_bad_nodes).lower()}",
        f"run_dir={shlex.quote(str(job.run_dir))}",
    ]
