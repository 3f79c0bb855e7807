"""Training on several nodes of a real Slurm: stopped, requeued, robbed of a node, and the same bits."""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launchers.submit import main as submit_main
from msa_train.training.metrics.writer import read_metrics
from tests.helpers.slurm_cluster import SlurmCluster, ended, powered_on
from tests.helpers.training_command import TINY, Training, last_step, without_times, write_corpus
from tests.slurm.test_batch_script import output

ROOT = Path(__file__).parents[2]
# on two processors that others use too
WITHIN_S = 600
STEPS = 40


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Settings that say what is trained on."""
    folder = tmp_path_factory.mktemp("data")
    write_corpus(folder / "corpus")
    return f"data.corpus={folder / 'corpus'}", f"data.cache_dir={folder / 'cache'}"


def command(cluster: SlurmCluster, module: str, *arguments: str) -> str:
    """Run one of our commands on the login node."""
    path = ":".join([str(ROOT), f"{ROOT}/kernels", os.environ.get("PYTHONPATH", "")])
    environ = {"PYTHONPATH": path, "TORCHDYNAMO_DISABLE": "1"}
    return cluster.run(
        sys.executable, "-m", f"launchers.{module}", *arguments, environ=environ, timeout=WITHIN_S
    )


def submit(cluster: SlurmCluster, run_dir: Path, *arguments: str) -> str:
    """Job id."""
    told = command(cluster, "submit", "cluster=local_cpu", "time=30", f"run_dir={run_dir}", *arguments)
    return told.rpartition("job ")[2]


def wait_for_step(cluster: SlurmCluster, run_dir: Path, step: int, job: str) -> None:
    """Wait for the step; fail at once if the job ends before."""

    def made() -> bool:
        if last_step(run_dir) >= step:
            return True
        assert not ended(cluster.job(job)), f"ended before step {step}:\n{output(run_dir)}"
        return False

    cluster.wait(made, f"step {step} of\n{output(run_dir)}", WITHIN_S)


def test_demo_trains_over_two_nodes(cluster: SlurmCluster, data: tuple[str, ...], tmp_path: Path) -> None:
    """2 nodes of 2 ranks, started by torch's agent: cp 2 inside each node, ep 2, dp 2; preflight before.

    After two steps the processes end for those of a stage with dp 4, in the same start of the job.
    """
    run_dir = tmp_path / "run"
    job = submit(
        cluster,
        run_dir,
        *("nodes=2", "run=demo", *data, "data.seq_len=1024", "train.global_batch_size=2", "train.steps=4"),
        *(
            "train.validate_every=4",
            "checkpoint.every=4",
            "logging.attention_every=0",
            "logging.tensorboard=false",
        ),
        *("stages=warmup", "stages.dense_warmup.tokens=4096", "stages.dense_warmup.attention=sparse"),
        *("stages.sparse.parallel.cp_size=1", "stages.sparse.global_batch_size=4"),
        *("cluster.preflight=true", "cluster.exclude_bad_nodes=false"),
    )
    cluster.wait_for_job(job, ended, WITHIN_S)
    text = output(run_dir)
    assert cluster.job(job)["JobState"] == "COMPLETED", text
    assert "demo: 4 processes on the CPU = dp 2 x cp 2 x tp 1 x pp 1, ep 2; engine torch" in text
    for node in ("node1", "node2"):
        assert re.search(rf"{node}: 0 GPUs, \d+ CPUs, \d+ GB free, clock [+-]0\.\d+ s, link", text), text
    assert re.search(r"all-reduce of 16 MB: \d+ ms", text), text
    assert "stage sparse: dp 4 x cp 1 x tp 1 x pp 1, ep 2, in processes of their own from step 3 on" in text
    assert text.count("next stage: sparse, from step 2\n") == 1
    assert [row["step"] for row in read_metrics(run_dir)] == [1, 2, 3, 4]
    assert (run_dir / "checkpoints" / "step_00000004").is_dir()
    # what a job leaves behind to be read, and to be submitted by hand
    facts = json.loads((run_dir / "slurm" / "job.json").read_text())
    assert facts["job_id"] == job
    assert "version" in facts["code"]
    assert "seq_len: 1024" in (run_dir / "slurm" / "config.yaml").read_text()
    assert cluster.run("sbatch", "--test-only", str(run_dir / "slurm" / "job.sbatch")) == ""
    status = command(cluster, "status", str(run_dir))
    assert re.search(rf"^job +{job}: COMPLETED$", status, re.MULTILINE), status
    assert re.search(r"^step +4 of 4, ", status, re.MULTILINE), status
    assert re.search(r"^last checkpoint +step 4, ", status, re.MULTILINE), status
    assert re.search(r"^restarts +0$", status, re.MULTILINE), status


@pytest.fixture
def undisturbed(data: tuple[str, ...], tmp_path: Path) -> Iterator[tuple[Training, Path]]:
    """The same training on this machine, begun before the job and read after it."""
    run_dir = tmp_path / "undisturbed"
    with Training(*TINY, *data, f"train.steps={STEPS}", f"run_dir={run_dir}") as training:
        yield training, run_dir


def test_stopped_requeued_and_robbed_of_a_node_it_comes_to_the_same_bits(
    cluster: SlurmCluster, data: tuple[str, ...], tmp_path: Path, undisturbed: tuple[Training, Path]
) -> None:
    """2 nodes of 1 rank, each a task of Slurm. The third node takes the place of the one that is lost."""
    run_dir = tmp_path / "run"
    job = submit(
        cluster,
        run_dir,
        *(*TINY, *data, f"train.steps={STEPS}", "nodes=2"),
        *("cluster.tasks=gpu", "cluster.workers_per_node=1"),
    )
    wait_for_step(cluster, run_dir, 3, job)
    with pytest.raises(RuntimeError, match=rf"job {job} \(RUNNING\) trains it already"):
        submit(cluster, run_dir, *TINY, *data, "nodes=2")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for_job(job, lambda fields: fields["Restarts"] == "1", WITHIN_S)
    slice_end = last_step(run_dir)

    wait_for_step(cluster, run_dir, slice_end + 3, job)
    cluster.run("scontrol", "requeue", job)
    cluster.wait_for_job(
        job, lambda fields: (fields["Restarts"], fields["JobState"]) == ("2", "RUNNING"), WITHIN_S
    )
    before = last_step(run_dir)

    wait_for_step(cluster, run_dir, before + 2, job)
    lost = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()[1]
    with powered_on(cluster, lost):
        cluster.power_off(lost)
        cluster.wait_for_job(job, ended, WITHIN_S)
        text = output(run_dir)
        assert cluster.job(job)["JobState"] == "COMPLETED", text
        assert lost not in cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()
    cluster.wait_idle()

    training, want_dir = undisturbed
    assert training.end(WITHIN_S) == 0, training.output + training.errors
    assert cluster.job(job)["Restarts"] == "3"
    assert f"stopped by SIGUSR1 after step {slice_end}: another start goes on from here" in text
    assert f"going on from step {slice_end}\n" in text
    want, got = read_metrics(want_dir), read_metrics(run_dir)
    assert [row["step"] for row in got] == list(range(1, STEPS + 1))
    for ours, theirs in zip(got, want, strict=True):
        assert without_times(ours) == without_times(theirs), f"step {theirs['step']}"


DEEPSPEED = ("engine=deepspeed", "deepspeed.zero_stage=2")


def test_deepspeed_is_requeued_and_goes_on(
    cluster: SlurmCluster, data: tuple[str, ...], tmp_path: Path
) -> None:
    """2 nodes of 1 rank, the same scripts; the same bits as without Slurm."""
    want_dir, run_dir = tmp_path / "undisturbed", tmp_path / "run"
    settings = (*TINY, *data, "train.steps=16", *DEEPSPEED)
    with Training(*settings, f"run_dir={want_dir}") as training:
        job = submit(
            cluster, run_dir, *settings, "nodes=2", "cluster.tasks=gpu", "cluster.workers_per_node=1"
        )
        wait_for_step(cluster, run_dir, 4, job)
        # more than 0 where a node that the test before has switched on was not ready
        restarts = int(cluster.job(job)["Restarts"])
        cluster.run("scontrol", "requeue", job)
        cluster.wait_for_job(job, ended, WITHIN_S)
        assert training.end(WITHIN_S) == 0, training.output + training.errors
    assert cluster.job(job)["JobState"] == "COMPLETED", output(run_dir)
    assert int(cluster.job(job)["Restarts"]) == restarts + 1
    assert "going on from step" in output(run_dir)
    want, got = read_metrics(want_dir), read_metrics(run_dir)
    assert [row["step"] for row in got] == list(range(1, 17))
    for ours, theirs in zip(got, want, strict=True):
        assert without_times(ours) == without_times(theirs), f"step {theirs['step']}"


def test_sweep_of_two_through_submitit(cluster: SlurmCluster, data: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra 'slurm'")
    told = command(
        cluster,
        "submit",
        *("-m", "cluster=local_cpu", "cluster.workers_per_node=1", "nodes=1", "time=10"),
        *(
            *TINY,
            *data,
            "parallel.cp_size=1",
            "parallel.ep_size=1",
            "train.steps=2",
            f"run_dir={tmp_path / 'sweep'}",
        ),
        "optim.lr=1e-3,4e-3",
    )
    for rate in ("0.001", "0.004"):
        run_dir = tmp_path / "sweep" / f"optim.lr={rate}"
        assert [row["step"] for row in read_metrics(run_dir)] == [1, 2], told
        assert f"{run_dir}" in told
    assert re.search(r"optim\.lr=0\.001 +step 2, lm_loss \d", told), told


def test_dry_run_prints_the_script_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    code = submit_main(
        [
            *(
                "run=smoke",
                "cluster=gpu_example",
                "nodes=1",
                f"run_dir={run_dir}",
                "engine=torch",
                "--dry-run",
            ),
            *("parallel.cp_size=8", "parallel.ep_size=4", "data.seq_len=4096"),
        ]
    )
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "#SBATCH --gpus-per-node=8\n" in captured.out
    assert not run_dir.exists()
