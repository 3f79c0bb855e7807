"""Finding the job that torchrun or srun started this process in. Plain functions of the environment."""

import re
from collections.abc import Mapping

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def joined_environment(environ: Mapping[str, str]) -> dict[str, str] | None:
    """Variables that torch.distributed needs, if this process is one of several; None if it stands alone.

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
        return {name: environ[name] for name in TORCHRUN_VARIABLES}
    return _slurm_environment(environ)


def _slurm_environment(environ: Mapping[str, str]) -> dict[str, str] | None:
    # SLURM_NTASKS speaks of the job; a step of another size has its own number
    num_tasks = int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or 1)
    if num_tasks < 2 or "SLURM_PROCID" not in environ or "SLURM_STEP_ID" not in environ:
        return None
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    if not nodes:
        raise ValueError(
            "SLURM_STEP_NODELIST=: is empty in a step of several tasks; start with srun, or set RANK, "
            "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        )
    local_rank = environ.get("SLURM_LOCALID", "0")
    # --gpus-per-task=1 shows each task one device, whose index is 0
    if re.fullmatch(r"[^,]+", environ.get("CUDA_VISIBLE_DEVICES", "")):
        local_rank = "0"
    port = slurm_port(environ.get("SLURM_JOB_ID", "0"), environ["SLURM_STEP_ID"])
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": str(num_tasks),
        "LOCAL_RANK": local_rank,
        "MASTER_ADDR": environ.get("MASTER_ADDR") or expand_nodelist(nodes)[0],
        "MASTER_PORT": environ.get("MASTER_PORT") or str(port),
    }


def slurm_port(job_id: str, step_id: str) -> int:
    """A port below the ephemeral range that other jobs and steps on the node do not use, from 20000 to 29999.

    Example: job 12345, step 0 -> 22345.
    """
    return 20000 + (int(job_id) + 101 * int(step_id)) % 10000


def expand_nodelist(nodelist: str) -> list[str]:
    """Host names of Slurm's compact notation.

    Example: "gpu[08-10,12],login" -> gpu08, gpu09, gpu10, gpu12, login.
    """
    # commas inside brackets separate ranges, the others separate groups of hosts
    return [
        host for part in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", nodelist) for host in _expand(part.strip())
    ]


def _expand(pattern: str) -> list[str]:
    match = re.search(r"\[([^\]]*)\]", pattern)
    if match is None:
        return [pattern]
    hosts: list[str] = []
    tails = _expand(pattern[match.end() :])
    for item in match[1].split(","):
        first, _, last = item.partition("-")
        for number in range(int(first), int(last or first) + 1):
            hosts += [f"{pattern[: match.start()]}{number:0{len(first)}d}{tail}" for tail in tails]
    return hosts
