"""What Slurm says about jobs, and the job that a run_dir belongs to."""

import re
import subprocess
from pathlib import Path

from msa_train.runtime.untrusted_files import read_record

FOLDER, SCRIPT_NAME, JOB_NAME = "slurm", "job.sbatch", "job.json"
ANSWER_WITHIN_S = 30


def ask_slurm(*command: str) -> str | None:
    """What a command of Slurm prints; None where there is no Slurm or it does not answer or refuses."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_WITHIN_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def submitted_job(run_dir: Path) -> str:
    """Id of the job that msa-submit submitted last for this run, empty if there is none.

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
    """Whether a text is the number of a job, and no option of the command that it is given to."""
    return re.fullmatch(r"\d[\d_+.]*", text) is not None


def check_no_job(run_dir: Path) -> None:
    """Make sure that no job for this run waits or runs.

    Raises:
        ValueError: naming the job, and what to do.
    """
    job = submitted_job(run_dir)
    state = ask_slurm("squeue", "--noheader", "--jobs", job, "--format=%T") if job else None
    if state:
        raise ValueError(
            f"run_dir={run_dir}: job {job} ({state.splitlines()[0]}) trains it already; wait for its end, "
            f"cancel it (scancel {job}), or use another run_dir"
        )
