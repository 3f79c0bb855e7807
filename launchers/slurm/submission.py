"""Prepare and submit one Slurm job.

Everything that the job is made of lies in run_dir/slurm before sbatch is called: script, configuration,
changes of the code. So a job that Slurm takes is never without them.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launchers.cli.output import say
from launchers.hydra_config.compose import compose_run, config_to_yaml
from launchers.hydra_config.options import CLUSTER, group_options
from launchers.local.launch_checks import check_files, describe, describe_stages, plan_layout
from launchers.local.run_dir import write_keeping
from launchers.slurm.batch_script import Job, batch_script
from launchers.slurm.code_version import code_version
from launchers.slurm.jobs import FOLDER, JOB_NAME, SCRIPT_NAME, check_no_job
from launchers.slurm.placement import check_placement
from msa_train.config import ClusterConfig, check_text
from msa_train.config.staging.views import layouts

# a busy controller answers late; a second job must not be submitted out of impatience
SUBMIT_WITHIN_S = 120


@dataclass(kw_only=True, slots=True)
class Request:
    """Hold the command line, sorted."""

    cluster: str = ""
    "name of a file in conf/cluster or DIR/cluster"
    nodes: int = 1
    "number of whole nodes"
    time: str = "01:00:00"
    "limit of one start"
    run: list[str] = field(default_factory=list[str])
    "overrides of msa-train"
    of_cluster: list[str] = field(default_factory=list[str])
    "overrides cluster.KEY=VALUE"
    config_dirs: list[Path] = field(default_factory=list[Path])
    "folders with more options"
    dry_run: bool = False
    "print, write and submit nothing"
    sweep: bool = False
    "-m: a job for every combination of values"


def read_request(arguments: Sequence[str]) -> Request:
    """Sort the arguments.

    Example: run=demo cluster=a nodes=2 cluster.qos=high -> cluster "a", nodes 2, run ["run=demo"], of_cluster
    ["cluster.qos=high"].

    Raises:
        ValueError: naming the argument, the rule and the fix.
    """
    request, left = Request(), iter(arguments)
    for text in left:
        key, equals, value = text.partition("=")
        if text == "--dry-run":
            request.dry_run = True
        elif text in ("-m", "--multirun"):
            request.sweep = True
        elif key == "--config-dir":
            request.config_dirs.append(Path(value if equals else next(left, "")).expanduser())
        elif text.startswith("-"):
            raise ValueError(f"{text}: there is no such option; see msa-submit --help")
        elif key == CLUSTER:
            request.cluster = value
        elif key == "time":
            request.time = value
        elif key == "nodes":
            if not re.fullmatch("0*[1-9][0-9]{0,4}", value):
                raise ValueError(f"nodes={value}: must be a number of nodes from 1 to 99999; use nodes=2")
            request.nodes = int(value)
        elif key.startswith(f"{CLUSTER}."):
            request.of_cluster.append(text)
        else:
            request.run.append(text)
    if not request.cluster:
        known = ", ".join(f"cluster={name}" for name in group_options(CLUSTER, request.config_dirs))
        raise ValueError(f"cluster: none is chosen and there is no default; use one of {known}")
    return request


def submit(request: Request, cluster: ClusterConfig) -> str:
    """Check, write, submit; returns the job id, empty with --dry-run.

    Args:
        request: the command line.
        cluster: with its overrides.

    Raises:
        ValueError: one line, if the run or the job is refused.
    """
    config = compose_run(request.run, request.config_dirs)
    layout = plan_layout(
        config,
        joined_world_size=request.nodes * cluster.workers,
        gpus_per_node=cluster.gpus_per_node,
    )
    run_dir, folder = Path(config.run_dir).absolute(), Path.cwd()
    for name, path in (("run_dir", run_dir), ("the current folder", folder)):
        check_text(name, str(path))
    # absolute: the job begins in the folder of the command, but tools may be called from another one
    config.run_dir = str(run_dir)
    # run_dir goes into the script once, absolute, and stands last
    given = [text for text in request.run if text.partition("=")[0].lstrip("+") != "run_dir"]
    options = [f"--config-dir={folder.absolute()}" for folder in request.config_dirs]
    job = Job(
        name=config.name,
        run_dir=run_dir,
        folder=folder,
        nodes=request.nodes,
        time=request.time,
        arguments=[*options, *given, f"run_dir={run_dir}"],
        python_path=os.environ.get("PYTHONPATH", ""),
    )
    script = batch_script(job, cluster)
    if request.dry_run:
        say(script, lines=True, end="")
        return ""
    # the cheap question first: check_files tokenizes the corpus, and leaves it in data.cache_dir for the job
    check_no_job(run_dir)
    check_files(config, say=say)
    say(f"{describe(config, layout)}; {request.nodes} nodes of {cluster.workers}")
    for line in describe_stages(config, layout):
        say(line)
    found = [own.parallel for _, own in layouts(config)]
    for parallel in [one for number, one in enumerate(found) if one not in found[:number]]:
        for line in check_placement(parallel, num_nodes=request.nodes, workers=cluster.workers):
            say(f"msa-submit: warning: {line}", error=True)
    written = run_dir / FOLDER
    written.mkdir(parents=True, exist_ok=True)
    write_keeping(written / SCRIPT_NAME, script)
    write_keeping(written / "config.yaml", config_to_yaml(config))
    # the commit and what was changed since: together they are the code that runs
    version, diff = code_version()
    write_keeping(written / "code.diff", diff)
    job_id = _sbatch(written / SCRIPT_NAME)
    facts = {
        "job_id": job_id,
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(["msa-submit", *sys.argv[1:]]),
        "cluster": request.cluster,
        "nodes": request.nodes,
        "time": request.time,
        "code": version,
    }
    write_keeping(written / JOB_NAME, json.dumps(facts, indent=1) + "\n")
    say(f"script {written / SCRIPT_NAME}")
    say(f"output {written / f'job-{job_id}.out'}")
    say(f"job {job_id}")
    return job_id


def _sbatch(script: Path) -> str:
    """Submit a script and return the job id.

    Raises:
        ValueError: if there is no sbatch, or it refuses.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(script)], capture_output=True, text=True, timeout=SUBMIT_WITHIN_S
        )
    except FileNotFoundError:
        raise ValueError(
            f"sbatch: is not installed here; submit on a login node of the cluster: sbatch {script}"
        ) from None
    except subprocess.TimeoutExpired:
        # it may have reached the controller all the same: a second job would be refused its run_dir
        raise ValueError(
            f"sbatch: Slurm has not answered within {SUBMIT_WITHIN_S} s; look with squeue whether the job is "
            f"there, else submit it again: sbatch {script}"
        ) from None
    if done.returncode:
        raise ValueError(f"sbatch refuses {script}: {done.stderr.strip() or done.stdout.strip()}")
    # "12345", or "12345;cluster"
    return done.stdout.strip().partition(";")[0]
