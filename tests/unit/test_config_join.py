"""Environments of torchrun and srun, and Slurm's node lists."""

import pytest

from launchers import train
from launchers.local.job_environment import (
    WORKERS_PER_NODE,
    Node,
    expand_nodelist,
    joined_environment,
    joined_node,
    said_by,
    slurm_generation,
    slurm_port,
)
from launchers.train import main
from msa_train.config.environment import SAID_BY

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


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "8"), ("RANK", "-1"), ("WORLD_SIZE", "x"), ("LOCAL_RANK", "²"), ("MASTER_PORT", "0")],
)
def test_leftover_variables_that_make_no_sense(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}={value}: must be .*unset"):
        joined_environment({**TORCHRUN, name: value})


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"])
def test_numbers_of_slurm_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=x: must be a number"):
        joined_environment({**SRUN, name: "x"})


def test_who_said_that_there_are_several() -> None:
    assert said_by(TORCHRUN) == said_by({**SRUN, **TORCHRUN}) == "RANK=3 and WORLD_SIZE=8"
    assert said_by(SRUN) == "SLURM_PROCID=5 and SLURM_NTASKS=8"
    assert said_by({**SRUN, "SLURM_STEP_NUM_TASKS": "4"}) == "SLURM_PROCID=5 and SLURM_STEP_NUM_TASKS=4"


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


def test_the_command_says_at_once_what_it_joins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the settings are refused because of it."""
    for name, value in {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "4", SAID_BY: ""}.items():
        monkeypatch.setenv(name, value)
    assert main(["run=smoke", "train.global_batch_size=1", "launcher.device=cpu", "--check"]) == 2
    told = capsys.readouterr()
    assert told.out == (
        "joining a job at node1:29500 as rank 0, 3 more are to come: RANK=0 and WORLD_SIZE=4 say so; "
        "unset these variables to train on this machine alone\n"
    )
    assert "train.global_batch_size=1: must be a multiple" in told.err


def test_a_leftover_rank_does_not_silence_a_refusal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "OTHER_RANKS_WAIT_S", 0.0)
    monkeypatch.setenv("RANK", "3")
    assert main(["run=smoke", "train.stepss=2"]) == 2
    assert "did you mean train.steps?" in capsys.readouterr().err
