"""Jobs for Slurm, as far as they can be checked without one: settings, script, refusals, sweeps."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launchers import sweep
from launchers.batch_script import COMMON, Job, batch_script, script_path
from launchers.compose import compose_run
from launchers.compose_cluster import compose_cluster
from launchers.groups import CLUSTER, group_options
from launchers.placement import check_placement
from launchers.submit import main, read_request
from launchers.sweep import expand, hydra_arguments
from msa_train.config import ClusterConfig, ContainerRuntime, ParallelConfig, Tasks, check_time
from msa_train.training.data_record import handed_on

JOB = Job(
    name="m3",
    run_dir=Path("/shared/runs/my run"),
    folder=Path("/shared/code"),
    nodes=8,
    time="04:00:00",
    arguments=["run=m3_200k", "data.corpus=/data/a b.jsonl"],
    python_path="",
)


def lines(cluster: ClusterConfig) -> list[str]:
    return batch_script(JOB, cluster).splitlines()


@pytest.mark.parametrize("name", list(group_options(CLUSTER)))
def test_every_cluster_gives_a_sound_script(name: str, tmp_path: Path) -> None:
    script = tmp_path / "job.sbatch"
    script.write_text(batch_script(JOB, compose_cluster(name, [])))
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_script_differs_from_the_one_by_hand_in_its_head_alone() -> None:
    text = batch_script(JOB, ClusterConfig())
    assert text.partition(COMMON)[2] == script_path().read_text().partition(COMMON)[2]
    settings = [line.partition("=")[0] for line in text.partition(COMMON)[0].splitlines() if "=" in line]
    by_hand = [line.partition("=")[0] for line in script_path().read_text().partition(COMMON)[0].splitlines()]
    for name in ("train", "preflight", "inside", "srun_options", "arguments", "tasks", "workers", "requeue"):
        assert name in settings
        assert name in by_hand
    assert "lr" not in "".join(settings)


def test_task_per_node_and_task_per_gpu() -> None:
    per_node = lines(ClusterConfig(gpus_per_node=4, cpus_per_worker=6))
    assert {"#SBATCH --ntasks-per-node=1", "#SBATCH --cpus-per-task=24", "tasks=node", "workers=4"} <= set(
        per_node
    )
    per_gpu = lines(ClusterConfig(gpus_per_node=4, cpus_per_worker=6, tasks=Tasks.gpu))
    assert {"#SBATCH --ntasks-per-node=4", "#SBATCH --cpus-per-task=6", "tasks=gpu", "workers=4"} <= set(
        per_gpu
    )


def test_values_with_spaces_and_variables_are_quoted() -> None:
    text = lines(ClusterConfig(environment={"GREETING": "it's $HOME"}, network={"NCCL_DEBUG": "WARN"}))
    assert "export GREETING='it'\"'\"'s $HOME'" in text
    assert "export NCCL_DEBUG=WARN" in text
    assert "arguments=(run=m3_200k 'data.corpus=/data/a b.jsonl')" in text
    assert "run_dir='/shared/runs/my run'" in text


def test_containers() -> None:
    image = {"container": "/images/m.sqsh", "container_mounts": ["/data:/data"]}
    pyxis = "\n".join(lines(ClusterConfig(**image)))
    assert "--container-image=/images/m.sqsh" in pyxis
    assert "/shared/code:/shared/code,/shared/runs/my run:/shared/runs/my run,/data:/data" in pyxis
    assert "train=(msa-train)" in pyxis
    apptainer = lines(ClusterConfig(**image, container_runtime=ContainerRuntime.apptainer))
    (inside,) = [line for line in apptainer if line.startswith("inside=")]
    assert inside.startswith("inside=(apptainer exec --nv --bind=/shared/code:/shared/code ")
    assert inside.endswith("--bind=/data:/data /images/m.sqsh)")


def test_venv_or_the_python_that_submits() -> None:
    assert "source /shared/venv/bin/activate" in lines(ClusterConfig(venv="/shared/venv"))
    assert f"train=({sys.executable} -m launchers.train)" in lines(ClusterConfig())


def test_nothing_is_imported_from_the_folder_of_the_command() -> None:
    """This code is, wherever it is, and an empty part of PYTHONPATH is that folder too."""
    root = str(Path(__file__).parents[2])
    for cluster, folders in ((ClusterConfig(), (root, f"{root}/kernels")), (ClusterConfig(venv="/v"), ())):
        job = dataclasses.replace(JOB, python_path=":/mine:")
        text = batch_script(job, cluster).splitlines()
        assert "export PYTHONSAFEPATH=1" in text
        assert f"export PYTHONPATH={':'.join([*folders, '/mine'])}" in text
    request = read_request(["cluster=local_cpu", "run=smoke", "optim.lr=1e-3,2e-3", "-m"])
    told = hydra_arguments(request, ClusterConfig(), Path("/runs"), {"optim.lr"})
    (setup,) = [text for text in told if text.startswith("hydra.launcher.setup=")]
    assert "export PYTHONSAFEPATH=1" in setup
    assert f"export PYTHONPATH={root}:{root}/kernels" in setup


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("04:00:00", 14400), ("1-00", 86400), ("1-02:30", 95400), ("90", 5400), ("90:30", 5430)],
)
def test_time(time: str, seconds: int) -> None:
    assert check_time(time, ClusterConfig()) == seconds


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("run=smoke", "cluster: none is chosen"),
        ("run=smoke cluster=gpu_exmple", "did you mean cluster=gpu_example?"),
        ("run=smoke cluster=local_cpu nodes=0", "nodes=0: must be a number of nodes"),
        ("run=smoke cluster=local_cpu nodes=2 time=soon", "time=soon: must be HH:MM:SS"),
        ("run=smoke cluster=gpu_example nodes=2 time=5", "time=5: leaves nothing to train in"),
        ("run=smoke cluster=local_cpu cluster.acount=me", "did you mean cluster.account?"),
        ("run=smoke cluster=local_cpu cluster.workers_per_node=x", "cluster.workers_per_node=x: "),
        ("run=smoke cluster=local_cpu cluster.workers_per_node=0", "use cluster.workers_per_node=2"),
        ("run=smoke cluster=gpu_example cluster.workers_per_node=9", "a node has 8"),
        ("run=smoke cluster=local_cpu nodes=3 parallel.cp_size=4", "must be a multiple of"),
        ("run=smoke cluster=local_cpu optim.lrr=1", "did you mean optim.lr?"),
        ("run=smoke cluster=local_cpu --dryrun", "--dryrun: there is no such option"),
        ("-m run=smoke cluster=local_cpu optim.lr=1e-3", "no key has several values"),
    ],
)
def test_bad_input_is_one_line(arguments: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments.split(), "--dry-run"] if "--dryrun" not in arguments else arguments.split()) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("msa-submit: error: ")
    assert errors.count("\n") == 1
    assert says in errors


def test_layout_is_checked_for_gpus_that_are_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run=m3_200k", "cluster=gpu_example", "nodes=16", "time=04:00:00", "--dry-run"]
    assert main(arguments) == 0
    assert "#SBATCH --nodes=16\n" in capsys.readouterr().out
    assert main([*arguments, "nodes=15"]) == 2
    assert "launcher.num_processes=120" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"cp_size": 8, "ep_size": 8}, []),
        ({"cp_size": 4, "tp_size": 2}, []),
        ({"cp_size": 16}, ["parallel.tp_size * cp_size of 16 ranks spans 2 nodes"]),
        ({"ep_size": 6}, ["parallel.ep_size of 6 ranks is cut by the end of a node of 8"]),
    ],
)
def test_placement_on_nodes_of_8(sizes: dict[str, int], says: list[str]) -> None:
    found = check_placement(ParallelConfig(**sizes), num_nodes=4, workers=8)
    assert len(found) == len(says)
    for line, start in zip(found, says, strict=True):
        assert line.startswith(start)
    assert check_placement(ParallelConfig(**sizes), num_nodes=1, workers=8) == []


def test_sweep_is_every_combination() -> None:
    swept, combinations = expand(["run=smoke", "optim.lr=1e-4,3e-4", "train.seed=1,2"])
    assert swept == {"optim.lr", "train.seed"}
    assert [row[1:] for row in combinations] == [
        ["optim.lr=0.0001", "train.seed=1"],
        ["optim.lr=0.0001", "train.seed=2"],
        ["optim.lr=0.0003", "train.seed=1"],
        ["optim.lr=0.0003", "train.seed=2"],
    ]


def test_sweep_asks_slurm_for_what_the_cluster_says(tmp_path: Path) -> None:
    request = read_request(["-m", "cluster=x", "run=smoke", "nodes=2", "time=01:00:00", "optim.lr=1,2"])
    cluster = ClusterConfig(account="me", gpus_per_node=4, sbatch=["--constraint=h100"], max_restarts=5)
    arguments = hydra_arguments(request, cluster, tmp_path, {"optim.lr"})
    assert {
        "hydra.launcher.nodes=2",
        "hydra.launcher.tasks_per_node=4",
        "hydra.launcher.gpus_per_node=4",
        'hydra.launcher.account="me"',
        "hydra.launcher.timeout_min=60",
        "hydra.launcher.max_num_timeout=5",
        'hydra.launcher.additional_parameters={constraint:"h100"}',
        'hydra.job.config.override_dirname.exclude_keys=["run", "run_dir"]',
        "optim.lr=1,2",
    } <= set(arguments)


def test_sweep_over_text_that_looks_like_a_number(tmp_path: Path) -> None:
    overrides = ["run=smoke", 'name=2024_01,b,"c,d"', "optim.lr=1"]
    swept, combinations = expand(overrides)
    assert swept == {"name"}
    assert [compose_run(row).name for row in combinations] == ["2024_01", "b", "c,d"]
    request = read_request(["-m", "cluster=x", *overrides, "data.text_field=1e5"])
    cluster = ClusterConfig(environment={"GREETING": "it's me"})
    arguments = hydra_arguments(request, cluster, tmp_path / "a=b, ü", swept)
    assert {'name="2024_01",b,"c,d"', 'data.text_field="1e5"', f'hydra.sweep.dir="{tmp_path}/a=b, ü"'} <= set(
        arguments
    )
    assert any("export GREETING='it'\\\"'\\\"'s me'" in text for text in arguments)


def test_a_job_of_a_sweep_hands_on_what_it_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 alone prepares; its workers train on just that, and find it."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("some text " * 2000)
    overrides = [f"run_dir={tmp_path / 'run'}", f"data.corpus={tmp_path / 'corpus'}"]
    config = compose_run(["run=smoke", *overrides, f"data.cache_dir={tmp_path / 'cache'}"])
    config.parallel.cp_size = config.parallel.ep_size = 1
    seen: list[object] = []
    monkeypatch.setattr(sweep, "run_config", lambda node: config)
    monkeypatch.setattr(sweep, "joined_environment", lambda environ: None)
    monkeypatch.setattr(sweep, "set_worker_environment", lambda *_: None)
    monkeypatch.setattr(sweep, "run_entry", lambda given: seen.append(handed_on(given)))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    sweep.train_job(SimpleNamespace(run_dir=config.run_dir))
    (given,) = seen
    assert given is not None
    assert given[0].num_documents == 1  # type: ignore[index]
