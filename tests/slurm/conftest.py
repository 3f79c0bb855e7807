"""The cluster that all tests of a process share, and jobs with a stand-in for training."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launchers.slurm.batch_script import Job, batch_script
from msa_train.config import ClusterConfig
from tests.helpers.slurm_cluster import NoClusterError, SlurmCluster

ROOT = Path(__file__).parents[2]
SubmitStandIn = Callable[..., tuple[str, Path]]


@pytest.fixture(scope="session")
def cluster() -> Iterator[SlurmCluster]:
    try:
        running = SlurmCluster()
        with running:
            yield running
    except NoClusterError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def submit_stand_in(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> SubmitStandIn:
    """Submit the batch script with a trainer that needs no torch: (job id, run_dir)."""

    def submit(
        name: str,
        *arguments: str,
        config: ClusterConfig,
        nodes: int = 2,
        time: str = "10",
        run_dir: Path | None = None,
        options: tuple[str, ...] = (),
    ) -> tuple[str, Path]:
        run_dir = run_dir or tmp_path_factory.mktemp(name) / "run"
        (run_dir / "slurm").mkdir(parents=True)
        job = Job(
            name=name,
            run_dir=run_dir,
            folder=ROOT,
            nodes=nodes,
            time=time,
            arguments=[f"run_dir={run_dir}", *arguments],
            python_path=f"{ROOT}:{ROOT}/kernels",
        )
        text = batch_script(job, config)
        ours, theirs = (
            f"{sys.executable} -m launchers.train",
            f"{sys.executable} -m tests.helpers.slurm_stand_in",
        )
        assert text.count(ours) == 1
        script = run_dir / "slurm" / "job.sbatch"
        script.write_text(text.replace(ours, theirs))
        return cluster.run("sbatch", "--parsable", *options, str(script)), run_dir

    return submit
