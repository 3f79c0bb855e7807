"""Find the job that torchrun or srun started this process in, from the environment alone.

Plain functions of a mapping: tests need neither Slurm nor torchrun. No node is asked, so all tasks come to
the same answer, head and port included, from what Slurm has given each of them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# set by the batch script where a task is a whole node's, not a rank's
WORKERS_PER_NODE = "MSA_TRAIN_WORKERS_PER_NODE"


@dataclass(kw_only=True, slots=True, frozen=True)
class Node:
    """Locate this task among the nodes of a Slurm step with one task per node."""

    rank: int
    "in Slurm's order of the nodes, which puts neighbours in the network beside each other"
    count: int
    "nodes of the step"
    num_workers: int
    "that each node starts"
    head: str
    "host name of node 0"
    port: int
    "of node 0, at which the agents meet"
    start: str
    "start of the job, as `slurm_generation` writes it"


def joined_node(environ: Mapping[str, str]) -> Node | None:
    """Find the node whose workers this process is to start; None where it is no task of such a step.

    Args:
        environ: of this process.

    Example: job 12345 on n[1-32], SLURM_PROCID=1, 8 workers per node -> rank 1 of 32, head n1, port 22345,
    start "12345.0".

    Raises:
        ValueError: where the number of workers makes no sense.
    """
    workers = environ.get(WORKERS_PER_NODE, "")
    # the shell of a batch script has SLURM_PROCID too; the tasks of srun alone have the number of a step
    if not workers or "RANK" in environ or "SLURM_PROCID" not in environ or "SLURM_STEP_ID" not in environ:
        return None
    if not workers.isdecimal() or int(workers) < 1:
        raise ValueError(f"{WORKERS_PER_NODE}={workers}: must be the number of workers that a node starts")
    nodes = _step_nodes(environ)
    return Node(
        rank=_number(environ, "SLURM_PROCID"),
        count=_step_tasks(environ),
        num_workers=int(workers),
        head=environ.get("MASTER_ADDR") or nodes[0],
        port=_step_port(environ),
        start=slurm_generation(environ),
    )


def slurm_generation(environ: Mapping[str, str]) -> str:
    """Name this start of a Slurm job: "12345.0", then "12345.1" after a requeue; empty without Slurm.

    Job id and restart count together: a requeued job keeps its id, and a start of it that lives on, cut off
    on a lost node, must be told from the one that took over.
    """
    job = environ.get("SLURM_JOB_ID", "")
    # unset, not 0, in the first start
    return f"{job}.{environ.get('SLURM_RESTART_COUNT') or 0}" if job else ""


def joined_environment(environ: Mapping[str, str]) -> dict[str, str] | None:
    """Collect the variables that torch.distributed needs, if this process is one of several; None if alone.

    torchrun's own come first, then those of a Slurm step with a task per rank.

    Example: SLURM_PROCID=9 of 16 tasks, SLURM_LOCALID=1, nodes n[1-2], job 12345, step 0 -> RANK=9,
    WORLD_SIZE=16, LOCAL_RANK=1, MASTER_ADDR=n1, MASTER_PORT=22345.

    Raises:
        ValueError: where a job is recognised but its description is incomplete.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        missing = [name for name in TORCHRUN_VARIABLES if not environ.get(name)]
        if missing:
            raise ValueError(
                f"RANK={environ['RANK']}: a process that is told its rank needs {', '.join(missing)} too; "
                "start it with torchrun, or unset RANK and WORLD_SIZE"
            )
        _check_numbers(environ)
        return {name: environ[name] for name in TORCHRUN_VARIABLES}
    return _slurm_environment(environ)


def said_by(environ: Mapping[str, str]) -> str:
    """Name the variables that made this process one of several: they may be left over, or those of a shell.

    Example: "RANK=0 and WORLD_SIZE=4".
    """
    names = ("RANK", "WORLD_SIZE")
    if not all(name in environ for name in names):
        names = ("SLURM_PROCID", _tasks_variable(environ))
    return " and ".join(f"{name}={environ[name]}" for name in names if name in environ)


def _check_numbers(environ: Mapping[str, str]) -> None:
    """Check ranks, sizes and port against their limits; a wrong one would hang in the rendezvous."""
    ends = {"WORLD_SIZE": (1, 10**6), "RANK": (0, 0), "LOCAL_RANK": (0, 10**6), "MASTER_PORT": (1, 65535)}
    for name, (lowest, highest) in ends.items():
        # RANK's limit is WORLD_SIZE, which the loop has checked by then
        highest = highest or int(environ["WORLD_SIZE"]) - 1
        if not lowest <= _number(environ, name) <= highest:
            raise ValueError(
                f"{name}={environ[name]}: must be from {lowest} to {highest}; start all ranks with torchrun, "
                "or unset RANK and WORLD_SIZE to train on this machine alone"
            )


def _number(environ: Mapping[str, str], name: str) -> int:
    """Read a number; int() alone would take "1_0", "+1" and digits of other scripts."""
    text = environ[name].strip()
    if not text.isascii() or not text.isdecimal():
        raise ValueError(
            f"{name}={environ[name]}: must be a number, as torchrun and srun set it; unset it to train "
            "on this machine alone"
        )
    return int(text)


def _slurm_environment(environ: Mapping[str, str]) -> dict[str, str] | None:
    """Translate the variables of a Slurm step with a task per rank; None for a step of one task."""
    num_tasks = _step_tasks(environ)
    if num_tasks < 2 or "SLURM_PROCID" not in environ or "SLURM_STEP_ID" not in environ:
        return None
    nodes = _step_nodes(environ)
    local_rank = environ.get("SLURM_LOCALID", "0")
    # --gpus-per-task=1 shows each task one device, whose index is 0
    if re.fullmatch(r"[^,]+", environ.get("CUDA_VISIBLE_DEVICES", "")):
        local_rank = "0"
    return {
        "RANK": str(_number(environ, "SLURM_PROCID")),
        "WORLD_SIZE": str(num_tasks),
        "LOCAL_RANK": local_rank,
        "MASTER_ADDR": environ.get("MASTER_ADDR") or nodes[0],
        "MASTER_PORT": str(_step_port(environ)),
    }


def _step_tasks(environ: Mapping[str, str]) -> int:
    """Count the tasks of the step."""
    # SLURM_NTASKS speaks of the job; a step of another size has its own number
    name = _tasks_variable(environ)
    return _number(environ, name) if environ.get(name) else 1


def _tasks_variable(environ: Mapping[str, str]) -> str:
    """Name the variable that holds the number of tasks."""
    return "SLURM_STEP_NUM_TASKS" if environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"


def _step_nodes(environ: Mapping[str, str]) -> list[str]:
    """List the nodes of the step, in the order of their ranks."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    if not nodes:
        raise ValueError(
            "SLURM_STEP_NODELIST=: is empty in a step of several tasks; start with srun, or set RANK, "
            "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        )
    return expand_nodelist(nodes)


def _step_port(environ: Mapping[str, str]) -> int:
    """Choose the port of node 0: MASTER_PORT where the user has set it."""
    if environ.get("MASTER_PORT"):
        return _number(environ, "MASTER_PORT")
    return slurm_port(environ.get("SLURM_JOB_ID", "0"), environ["SLURM_STEP_ID"])


def slurm_port(job_id: str, step_id: str) -> int:
    """Compute a port from 20000 to 29999 that other jobs and steps on the node are unlikely to use.

    Every task computes the same one without asking. It lies below Linux's ephemeral ports, 32768 and up, one
    of which an outgoing connection might hold. Steps of a job are 101 apart, so that a new one, and the port
    above it, do not meet what the last one has left.

    Example: job 12345, step 0 -> 22345; step 1 -> 22446.
    """
    return 20000 + (int(job_id) + 101 * int(step_id)) % 10000


def expand_nodelist(nodelist: str) -> list[str]:
    """Expand Slurm's compact notation to host names; `scontrol show hostnames` is not in every container.

    Example: "gpu[08-10,12],login" -> gpu08, gpu09, gpu10, gpu12, login.
    Example: "r[1-2]n[1-2]" -> r1n1, r1n2, r2n1, r2n2.
    """
    # commas inside brackets separate ranges, the others separate groups of hosts
    return [
        host for part in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", nodelist) for host in _expand(part.strip())
    ]


def _expand(pattern: str) -> list[str]:
    """Expand the first brackets of one group of hosts, and those after it by recursion."""
    match = re.search(r"\[([^\]]*)\]", pattern)
    if match is None:
        return [pattern]
    hosts: list[str] = []
    tails = _expand(pattern[match.end() :])
    for item in match[1].split(","):
        first, _, last = item.partition("-")
        # Slurm keeps leading zeros: as many digits as the first number of a range has
        for number in range(int(first), int(last or first) + 1):
            hosts += [f"{pattern[: match.start()]}{number:0{len(first)}d}{tail}" for tail in tails]
    return hosts
