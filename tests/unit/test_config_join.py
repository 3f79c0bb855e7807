"""Environments of torchrun and srun, and Slurm's node lists."""

import pytest

from launchers.join import (
    WORKERS_PER_NODE,
    Node,
    expand_nodelist,
    joined_environment,
    joined_node,
    slurm_generation,
    slurm_port,
)

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "PATH": "/bin",
}
SRUN = {
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


def test_alone() -> None:
    assert joined_environment({"PATH": "/bin"}) is None


def test_torchrun() -> None:
    assert joined_environment(TORCHRUN) == {key: value for key, value in TORCHRUN.items() if key != "PATH"}


def test_torchrun_inside_srun_wins() -> None:
    joined = joined_environment({**SRUN, **TORCHRUN})
    assert joined is not None
    assert joined["RANK"] == "3"


def test_incomplete_torchrun_names_what_is_missing() -> None:
    environ = {key: value for key, value in TORCHRUN.items() if key != "MASTER_ADDR"}
    with pytest.raises(ValueError, match=r"RANK=3: .* MASTER_ADDR too; start it with torchrun"):
        joined_environment(environ)


def test_srun() -> None:
    assert joined_environment(SRUN) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "22345",
    }


def test_srun_task_with_a_device_of_its_own_uses_index_0() -> None:
    joined = joined_environment({**SRUN, "CUDA_VISIBLE_DEVICES": "3"})
    assert joined is not None
    assert joined["LOCAL_RANK"] == "0"


def test_size_of_the_step_beats_that_of_the_job() -> None:
    assert joined_environment({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize("missing", ["SLURM_STEP_ID", "SLURM_PROCID"])
def test_batch_script_itself_is_no_step(missing: str) -> None:
    assert joined_environment({key: value for key, value in SRUN.items() if key != missing}) is None


def test_step_without_node_list_is_refused() -> None:
    with pytest.raises(ValueError, match=r"SLURM_STEP_NODELIST=: .* start with srun"):
        joined_environment({**SRUN, "SLURM_STEP_NODELIST": ""})


def test_task_of_a_whole_node() -> None:
    environ = {**SRUN, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_RESTART_COUNT": "3"}
    assert joined_node(environ) is None
    assert joined_node({**environ, WORKERS_PER_NODE: "8"}) == Node(
        rank=1, count=2, num_workers=8, head="gpu07", port=22345, start="12345.3"
    )
    # a worker that such a node has started
    assert joined_node({**environ, **TORCHRUN, WORKERS_PER_NODE: "8"}) is None
    with pytest.raises(ValueError, match=f"{WORKERS_PER_NODE}=many: must be the number"):
        joined_node({**environ, WORKERS_PER_NODE: "many"})


def test_starts_of_a_job() -> None:
    assert slurm_generation({}) == ""
    assert slurm_generation({"SLURM_JOB_ID": "7"}) == "7.0"
    assert slurm_generation({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}) == "7.2"


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("login", ["login"]),
        ("a,b", ["a", "b"]),
        ("gpu[1-3]", ["gpu1", "gpu2", "gpu3"]),
        ("gpu[08-10,12],login", ["gpu08", "gpu09", "gpu10", "gpu12", "login"]),
        ("r[1-2]n[1-2]-ib", ["r1n1-ib", "r1n2-ib", "r2n1-ib", "r2n2-ib"]),
    ],
)
def test_expand_nodelist(nodelist: str, hosts: list[str]) -> None:
    assert expand_nodelist(nodelist) == hosts


def test_port_depends_on_job_and_step() -> None:
    ports = {slurm_port(job, step) for job in ("1", "2") for step in ("0", "1")}
    assert len(ports) == 4
    assert all(20000 <= port < 30000 for port in ports)
