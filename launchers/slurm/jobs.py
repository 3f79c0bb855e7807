"""Ask Slurm about jobs, and find the job that a run_dir belongs to.

Each question is one short-lived command on the login node, asked once: squeue loads the controller of the
whole cluster, and nothing here polls it.
"""

import re
import subprocess
from pathlib import Path

from msa_train.runtime.untrusted_files import read_record

FOLDER, SCRIPT_NAME, JOB_NAME = "slurm", "job.sbatch", "job.json"
ANSWER_WITHIN_S = 30


def ask_slurm(*command: str) -> str | None:
    """Return what a command of Slurm prints; None where there is no Slurm, no answer or a refusal.

    Args:
        command: name and arguments; waited for ANSWER_WITHIN_S at most.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_WITHIN_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def submitted_job(run_dir: Path) -> str:
    """Read the id of the job that msa-submit submitted last for this run, empty if there is none.

    Raises:
        ValueError: one line, if the file that says so is damaged.
    """
    path = run_dir / FOLDER / JOB_NAME
    try:
        job: str = read_record(path, {"job_id": str})["job_id"]
    except FileNotFoundError:
        return ""
    if not is_job(job):
        raise ValueError(f"{path}: is damaged (job_id={job} is no number of a job); remove it")
    return job


def is_job(text: str) -> bool:
    """Tell whether a text is the number of a job, and no option of the command that it is given to.

    It comes from a file in run_dir, which another user may have written.

    Example: "12345", "12345_7" (of an array), "12345+1" (of a heterogeneous job) -> True; "--all" -> False.
    """
    return re.fullmatch(r"\d[\d_+.]*", text) is not None


def check_no_job(run_dir: Path) -> None:
    """Make sure that no job for this run waits or runs: two in one run_dir would fence each other off.

    Raises:
        ValueError: naming the job, and what to do.
    """
    job = submitted_job(run_dir)
    # squeue lists jobs that wait or run, so any state is one too many; no answer must not keep a user out
    state = ask_slurm("squeue", "--noheader", "--jobs", job, "--format=%T") if job else None
    if state:
        raise ValueError(
            f"run_dir={run_dir}: job {job} ({state.splitlines()[0]}) trains it already; wait for its end, "
            f"cancel it (scancel {job}), or use another run_dir"
        )
