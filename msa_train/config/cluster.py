"""Describe a cluster to msa-submit; nothing in here changes what is computed."""

import re
from dataclasses import dataclass, field
from enum import Enum

from msa_train.config.rules.limits import COUNT, LONGEST_WAIT_S, check_size
from msa_train.config.rules.numbers import check_finite_numbers
from msa_train.config.rules.text import check_text, texts

DURATION = re.compile(r"(\d{1,4}-)?\d{1,9}(:\d{1,9}){0,2}", re.ASCII)
LONGEST_JOB_S = 3650 * 24 * 3600
_LIMITS = {
    "gpus_per_node": 1024,
    "workers_per_node": 1024,
    "cpus_per_worker": 2**16,
    "signal_lead_s": LONGEST_WAIT_S,
    "max_restarts": COUNT,
}


class Tasks(Enum):
    """Choose what Slurm starts on a node."""

    node = "node"  # one task, which starts torch's elastic agent and through it a worker per GPU
    gpu = "gpu"  # one task per worker: nothing stands between Slurm and the trainer


class ContainerRuntime(Enum):
    """Choose who opens a container image."""

    pyxis = "pyxis"  # a plugin of srun: --container-image
    apptainer = "apptainer"  # a command before the command


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """Hold one file of conf/cluster. Empty text leaves the choice to Slurm."""

    partition: str = ""
    "of Slurm"
    account: str = ""
    "of Slurm, which the job is charged to"
    qos: str = ""
    "quality of service of Slurm"
    gpus_per_node: int = 8
    "0: a cluster without GPUs"
    workers_per_node: int = 0
    "0: one per GPU"
    cpus_per_worker: int = 8
    "processor cores of a worker"
    memory: str = ""
    "per node, as Slurm writes it: 500G; 0: all of it"
    exclusive: bool = True
    "no other job on the nodes"
    tasks: Tasks = Tasks.node
    "processes that Slurm starts on a node"
    sbatch: list[str] = field(default_factory=list[str])
    "more options of sbatch, such as --constraint=h100"
    srun: list[str] = field(default_factory=list[str])
    "more options of srun"

    venv: str = ""
    "virtual environment that nodes share; empty: the one that msa-submit runs in; unused with a container"
    container: str = ""
    "image with msa_train installed; empty: none"
    container_runtime: ContainerRuntime = ContainerRuntime.pyxis
    "program that opens the image"
    container_mounts: list[str] = field(default_factory=list[str])
    "HOST:INSIDE, besides run_dir and the current folder"
    setup: list[str] = field(default_factory=list[str])
    "lines of shell before everything else, such as module load cuda"
    environment: dict[str, str] = field(default_factory=dict[str, str])
    "variables of the job"
    network: dict[str, str] = field(default_factory=dict[str, str])
    "variables too: those of NCCL and of the fabric, which differ between sites"

    signal_lead_s: int = 300
    "a run is asked to save and stop so many seconds before its time is up; Slurm may ask up to 60 s earlier"
    requeue: bool = True
    "go on in another slice of time; also after the loss of a node"
    max_restarts: int = 3
    "starts without a new checkpoint between them, before the job is given up"
    preflight: bool = True
    "check every node before each start"
    min_memory_gb: float = 0.0
    "free memory that the preflight asks of every node, GB"
    exclude_bad_nodes: bool = True
    "a node that the preflight names is left out and the job requeued; false: the job ends"

    @property
    def workers(self) -> int:
        """Count the workers of one node."""
        return self.workers_per_node or self.gpus_per_node


def check_cluster(cluster: ClusterConfig) -> None:
    """Check everything that can be checked without Slurm.

    Raises:
        ValueError: naming the value, the rule and the fix.
    """
    check_finite_numbers(cluster, "cluster.")
    for name, value in texts(cluster, "cluster."):
        check_text(name, value)
    for name in ("gpus_per_node", "workers_per_node", "max_restarts", "min_memory_gb", "signal_lead_s"):
        if getattr(cluster, name) < 0:
            raise ValueError(f"cluster.{name}={getattr(cluster, name)}: must not be negative")
    for name, limit in _LIMITS.items():
        check_size(f"cluster.{name}", getattr(cluster, name), limit)
    if cluster.cpus_per_worker < 1:
        raise ValueError(f"cluster.cpus_per_worker={cluster.cpus_per_worker}: must be at least 1")
    if not cluster.workers:
        raise ValueError(
            "cluster.workers_per_node=0: stands for one per GPU and there are none with "
            "cluster.gpus_per_node=0; use cluster.workers_per_node=2"
        )
    if 0 < cluster.gpus_per_node < cluster.workers:
        raise ValueError(
            f"cluster.workers_per_node={cluster.workers}: one worker per GPU and a node has "
            f"{cluster.gpus_per_node}; use cluster.workers_per_node=0"
        )
    for name in ("environment", "network"):
        for key in getattr(cluster, name):
            if not re.fullmatch(r"[A-Za-z_]\w*", key):
                raise ValueError(f"cluster.{name}.{key}: is no name of a variable; use letters, digits and _")


def check_time(time: str, cluster: ClusterConfig) -> int:
    """Convert a time limit as Slurm writes it (sbatch --time) to seconds.

    Example: 04:00:00 -> 14400, 1-00 -> 86400, 90 (minutes) -> 5400.

    Raises:
        ValueError: if it is no time, or none would be left to train in.
    """
    if not DURATION.fullmatch(time):
        raise ValueError(f"time={time}: must be HH:MM:SS, D-HH:MM:SS or minutes; use time=04:00:00")
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    # behind a day, parts are hours first; without one, two parts are minutes and seconds
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, minutes, seconds = 0, *[*parts, 0][:2]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if total <= cluster.signal_lead_s + 60:
        raise ValueError(
            f"time={time}: leaves nothing to train in, as saving begins up to cluster.signal_lead_s="
            f"{cluster.signal_lead_s} + 60 s before its end; use more time or a smaller lead"
        )
    if total > LONGEST_JOB_S:
        raise ValueError(f"time={time}: must be at most {LONGEST_JOB_S // 86400} days; use less")
    return total
