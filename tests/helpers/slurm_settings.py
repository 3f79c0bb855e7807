"""Configuration files of a small Slurm cluster for tests: quick to notice a dead node, quick to act."""

from dataclasses import dataclass
from pathlib import Path

# RFC 2544 sets this range aside for tests; it exists only inside the cluster's own namespaces
NETWORK = "198.18.43"
CONTROL = "control"
CONTROL_PORT, NODE_PORT = 6817, 6818
FREEZER = Path("/sys/fs/cgroup/freezer")


@dataclass(kw_only=True, slots=True, frozen=True)
class Shape:
    """What the cluster pretends to be; the machine may have less."""

    num_nodes: int = 3
    cpus: int = 4
    gpus: int = 2
    "null devices in place of GPUs: Slurm counts them and sets CUDA_VISIBLE_DEVICES"
    memory_mb: int = 4000
    dead_after_s: int = 6
    "a node that is silent for so long is down and its jobs are requeued"

    @property
    def nodes(self) -> list[str]:
        """Host names, not in alphabetical order of their numbers from node10 on, as on real clusters."""
        return [f"node{number}" for number in range(1, self.num_nodes + 1)]


def address(host: str) -> str:
    """Of a host: control, node1, node2 ..."""
    return f"{NETWORK}.{1 if host == CONTROL else 10 + int(host.removeprefix('node'))}"


def process_tracking(shape: Shape) -> str:
    """How Slurm finds a job's processes, which decides what a signal reaches.

    With cgroups, as on nearly every cluster, only the first process of each task (SIGKILL: all); otherwise
    every descendant. Cgroups where the freezer of version 1 can be used and no other cluster uses it.
    """
    taken = any((FREEZER / f"slurm_{node}").exists() for node in shape.nodes)
    usable = (FREEZER / "cgroup.procs").exists() and not taken
    return "proctrack/cgroup" if usable else "proctrack/linuxproc"


def write_settings(folder: Path, shape: Shape) -> None:
    """Write all files of the cluster; `folder` must be readable for all, with a short path."""
    for name in ("state", "log", *(f"spool/{node}" for node in shape.nodes)):
        (folder / name).mkdir(parents=True)
    hosts = "".join(f"{address(host)} {host}\n" for host in (CONTROL, *shape.nodes))
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
    # no name look-up may leave a host: nobody would answer
    (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
    tracking = process_tracking(shape)
    if tracking == "proctrack/cgroup":
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    lines = ["AutoDetect=off"]
    last = shape.gpus - 1
    lines += [f"NodeName={node} Name=gpu File={folder}/{node}-gpu[0-{last}]" for node in shape.nodes]
    (folder / "gres.conf").write_text("\n".join(lines) + "\n")
    (folder / "slurm.conf").write_text("\n".join(_slurm_conf(folder, shape, tracking)) + "\n")


def _slurm_conf(folder: Path, shape: Shape, tracking: str) -> list[str]:
    settings = {
        "ClusterName": "test",
        "SlurmctldHost": f"{CONTROL}({address(CONTROL)})",
        "SlurmctldPort": CONTROL_PORT,
        "SlurmdPort": NODE_PORT,
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        # a requeued job waits as long as a credential lives, 2 minutes by default
        "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": f"{folder}/spool/%n",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": f"{folder}/slurmd.%n.pid",
        "SlurmctldLogFile": folder / "log/slurmctld.log",
        "SlurmdLogFile": f"{folder}/log/slurmd.%n.log",
        "MailProg": "/bin/true",
        "ProctrackType": tracking,
        "TaskPlugin": "task/none",
        "SwitchType": "switch/none",
        "MpiDefault": "none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "GresTypes": "gpu",
        # nodes claim more than the machine has
        "SlurmdParameters": "config_overrides",
        # a node that was set down by hand stays down; one that was silent comes back
        "ReturnToService": 1,
        "SlurmctldTimeout": 10,
        "SlurmdTimeout": shape.dead_after_s,
        "MessageTimeout": 5,
        "TCPTimeout": 2,
        "BatchStartTimeout": 10,
        "KillWait": 5,
        "UnkillableStepTimeout": 15,
        # finished jobs stay visible
        "MinJobAge": 3600,
        "JobRequeue": 1,
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
    }
    lines = [f"{key}={value}" for key, value in settings.items()]
    for node in shape.nodes:
        lines.append(
            f"NodeName={node} NodeAddr={address(node)} CPUs={shape.cpus} RealMemory={shape.memory_mb} "
            f"Gres=gpu:{shape.gpus}"
        )
    partition = "Nodes=ALL MaxTime=INFINITE State=UP"
    lines.append(f"PartitionName=train {partition} Default=YES PriorityTier=1 GraceTime=10")
    lines.append(f"PartitionName=urgent {partition} Default=NO PriorityTier=10 PreemptMode=OFF")
    return lines
