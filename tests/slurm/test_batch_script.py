"""The batch script on a real Slurm, a stand-in for the trainer: when a job comes back, when it must not."""

import re
import subprocess
from pathlib import Path

import pytest

from launchers.slurm.batch_script import script_path
from msa_train.config import ClusterConfig, Tasks
from tests.helpers.slurm_cluster import SlurmCluster, ended
from tests.slurm.conftest import SubmitStandIn

# on two processors that others use too
WITHIN_S = 240
SMALL = {
    "gpus_per_node": 0,
    "workers_per_node": 2,
    "cpus_per_worker": 1,
    "exclusive": False,
    "preflight": False,
    "max_restarts": 1,
    "signal_lead_s": 20,
}


def output(run_dir: Path) -> str:
    """What the job printed in all its starts."""
    return "".join(path.read_text() for path in sorted((run_dir / "slurm").glob("job-*.out")))


def wait_for_text(cluster: SlurmCluster, run_dir: Path, text: str) -> None:
    cluster.wait(lambda: text in output(run_dir), f"{text!r} in\n{output(run_dir)}", WITHIN_S)


@pytest.fixture(scope="module")
def submitted(cluster: SlurmCluster, submit_stand_in: SubmitStandIn) -> dict[str, tuple[str, Path]]:
    """Jobs that run at the same time, as a requeued one waits for seconds; two are warned of their end."""
    jobs = {
        f"slices_{tasks.value}": submit_stand_in(
            "slices", "steps=40", config=ClusterConfig(**SMALL, tasks=tasks)
        )
        for tasks in Tasks
    }
    for job, run_dir in list(jobs.values()):
        wait_for_text(cluster, run_dir, "step 5")
        cluster.run("scancel", "--batch", "--signal=USR1", job)
    # a minute, and Slurm warns at its half, or earlier: it looks now and then
    config = ClusterConfig(**{**SMALL, "signal_lead_s": 30})
    jobs["time_limit"] = submit_stand_in("time_limit", "steps=900", config=config, time="1")
    jobs["stages"] = submit_stand_in("stages", "steps=9", "stage_at=4", config=ClusterConfig(**SMALL))
    jobs["crash"] = submit_stand_in("crash", "steps=9", "crash_at=3", config=ClusterConfig(**SMALL))
    return jobs


@pytest.mark.parametrize("tasks", Tasks)
def test_warned_of_the_end_of_its_time_it_saves_and_comes_back(
    cluster: SlurmCluster, submitted: dict[str, tuple[str, Path]], tasks: Tasks
) -> None:
    job, run_dir = submitted[f"slices_{tasks.value}"]
    cluster.wait_for_job(job, ended, WITHIN_S)
    text = output(run_dir)
    assert cluster.job(job)["JobState"] == "COMPLETED", text
    assert "the time is nearly up" in text
    assert f"and saved: requeueing job {job}" in text
    assert "== finished" not in text.partition("requeueing")[0]
    starts = (run_dir / "slurm" / "starts.tsv").read_text().splitlines()
    assert [line.split("\t")[2] for line in starts] == [f"{job}.0", f"{job}.1"]
    assert int(starts[1].split("\t")[3]) >= 5
    num_tasks = 2 if tasks is Tasks.node else 4
    assert text.count(": step 40\n") == num_tasks


def test_slurm_itself_warns_before_the_time_is_up(
    cluster: SlurmCluster, submitted: dict[str, tuple[str, Path]]
) -> None:
    job, run_dir = submitted["time_limit"]
    cluster.wait_for_job(job, lambda fields: fields["Restarts"] == "1", WITHIN_S)
    wait_for_text(cluster, run_dir, f"start {job}.1 on")
    cluster.run("scancel", job)
    first, second = re.findall(r"newest checkpoint: (\w+)", output(run_dir))
    assert first == "none"
    assert 0 < int(second) < 600, output(run_dir)


def test_next_stage_begins_in_the_same_start(
    cluster: SlurmCluster, submitted: dict[str, tuple[str, Path]]
) -> None:
    job, run_dir = submitted["stages"]
    cluster.wait_for_job(job, ended, WITHIN_S)
    text = output(run_dir)
    assert (cluster.job(job)["JobState"], cluster.job(job)["Restarts"]) == ("COMPLETED", "0"), text
    first, second = text.split("next stage: long, from step 4\n")
    assert "step 4\n" in first
    assert "step 5\n" not in first
    assert "step 9\n" in second
    assert "== finished" not in first
    assert len((run_dir / "slurm" / "starts.tsv").read_text().splitlines()) == 1


def test_crash_without_progress_is_tried_again_and_then_given_up(
    cluster: SlurmCluster, submitted: dict[str, tuple[str, Path]]
) -> None:
    job, run_dir = submitted["crash"]
    cluster.wait_for_job(job, ended, WITHIN_S)
    assert cluster.job(job)["JobState"] == "FAILED"
    text = output(run_dir)
    assert text.count(": requeueing job") == 2
    assert "giving up: 2 starts in a row saved nothing beyond step 0 (max_restarts=1)" in text


def test_bad_node_is_named_and_excluded(
    cluster: SlurmCluster, submit_stand_in: SubmitStandIn, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    cluster.wait_idle()
    config = ClusterConfig(**{**SMALL, "preflight": True})
    tmp_path.chmod(0o755)
    with cluster.read_only("node2", tmp_path):
        job, _ = submit_stand_in("bad_node", "steps=2", config=config, run_dir=run_dir)
        cluster.wait_for_job(job, ended, WITHIN_S)
    text = output(run_dir)
    assert cluster.job(job)["JobState"] == "COMPLETED", text
    # from the file: what a step prints just before Slurm ends it may be lost
    assert re.search(r"^node2: run_dir cannot be written: Read-only", text, re.MULTILINE), text
    assert f"the preflight found bad nodes: node2: requeueing job {job}" in text
    assert (cluster.job(job)["Restarts"], cluster.job(job)["ExcNodeList"]) == ("1", "node2")
    assert cluster.job(job)["NodeList"] == "node[1,3]"


def test_cancelled_job_stays_cancelled(cluster: SlurmCluster, submit_stand_in: SubmitStandIn) -> None:
    job, run_dir = submit_stand_in("cancel", "steps=9000", config=ClusterConfig(**SMALL))
    wait_for_text(cluster, run_dir, "step 3")
    cluster.run("scancel", job)
    cluster.wait_for_job(job, lambda fields: fields["JobState"] == "CANCELLED", WITHIN_S)
    cluster.wait(lambda: not cluster.run("squeue", "-h", "-j", job, "-o", "%T"), "its end", WITHIN_S)
    assert cluster.job(job)["Restarts"] == "0"
    assert "requeueing" not in output(run_dir)


def test_unreachable_run_dir_is_told_at_once(cluster: SlurmCluster, submit_stand_in: SubmitStandIn) -> None:
    job, run_dir = submit_stand_in("unreachable", "steps=1", config=ClusterConfig(**SMALL))
    script = run_dir / "slurm" / "job.sbatch"
    cluster.run("scancel", job)
    lost = "/proc/lost/run"
    script.write_text(script.read_text().replace(f"run_dir={run_dir}\n", f"run_dir={lost}\n"))
    job = cluster.run("sbatch", "--parsable", str(script))
    cluster.wait_for_job(job, ended, WITHIN_S)
    assert cluster.job(job)["JobState"] == "FAILED"
    assert f"giving up: run_dir={lost} cannot be written from node" in output(run_dir)


def test_element_of_an_array_requeues_itself_alone(
    cluster: SlurmCluster, submit_stand_in: SubmitStandIn
) -> None:
    """The last element's own number is that of the array."""
    job, run_dir = submit_stand_in(
        "array", "steps=60", config=ClusterConfig(**SMALL), nodes=1, options=("--array=0-1",)
    )
    # both elements share run_dir here, which only matters for what they save
    cluster.wait(lambda: output(run_dir).count("step 3\n") >= 2, "both elements to run", WITHIN_S)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_1")
    wait_for_text(cluster, run_dir, f"requeueing job {job}_1")

    def restarts(element: int) -> str:
        return cluster.job(f"{job}_{element}")["Restarts"]

    cluster.wait(lambda: restarts(1) == "1", "the element to come back", WITHIN_S)
    assert restarts(0) == "0"
    cluster.run("scancel", job)


def test_preempted_job_saves_within_the_grace_and_comes_back(
    cluster: SlurmCluster, submit_stand_in: SubmitStandIn
) -> None:
    job, run_dir = submit_stand_in("preempted", "steps=30", config=ClusterConfig(**SMALL), nodes=3)
    wait_for_text(cluster, run_dir, "step 3\n")
    urgent = cluster.run(
        "sbatch", "--parsable", "-N3", "--exclusive", "-purgent", "--output=/dev/null", "--wrap=sleep 1"
    )
    cluster.wait_for_job(urgent, ended, WITHIN_S)
    cluster.wait_for_job(job, ended, WITHIN_S)
    text = output(run_dir)
    assert cluster.job(job)["JobState"] == "COMPLETED", text
    assert cluster.job(job)["Restarts"] == "1"
    before, after = re.findall(r"newest checkpoint: (\w+)", text)
    assert before == "none"
    assert 3 <= int(after) < 30, text


def test_script_for_submission_by_hand_is_accepted(cluster: SlurmCluster) -> None:
    """Its default layout, 2 nodes of 8 GPUs, is more than there is here."""
    small = ("--gpus-per-node=2", "--cpus-per-task=4", "--nodes=2")
    cluster.run("sbatch", "--test-only", *small, str(script_path()), "run=m3_200k")
    subprocess.run(["bash", "-n", str(script_path())], check=True)
