"""--help, --cfg, --version, --check, and what decides which rank fails first."""

import signal
from pathlib import Path

import pytest

from launchers import train
from launchers.hydra_config.compose import compose_run, load_run
from launchers.hydra_config.options import CLUSTER, OPTION_GROUPS, config_dir
from launchers.local.failure_report import WorkerFailure, first_failure, report
from launchers.local.launch_checks import Layout, count_gpus, describe, plan_layout


def test_help_lists_every_run_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--help"]) == 0
    text = capsys.readouterr().out
    for path in config_dir().glob("*/*.yaml"):
        assert path.stem in text or path.parent.name == CLUSTER
    assert all(group in text for group in OPTION_GROUPS)
    assert "--check" in text


def test_cfg_prints_what_the_workers_would_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run=demo", "train.steps=7", "engine=torch"]
    assert train.main([*arguments, "--cfg"]) == 0
    path = tmp_path / "config.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_run(path) == compose_run(arguments)


def test_cfg_prints_one_value_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["run=demo", "run_dir=it's a:b, Müller", "--cfg=run_dir", "--cfg=engine"]) == 0
    assert capsys.readouterr().out == "it's a:b, Müller\ntorch\n"
    assert train.main(["run=demo_warmup", "--cfg=stages.dense_warmup.attention"]) == 0
    assert capsys.readouterr().out == "dense\n"
    assert train.main(["run=demo", "--cfg=stages"]) == 2
    assert "--cfg=stages: there is no such key" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("msa-train ")


def test_no_visible_gpu_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert count_gpus() == 0


@pytest.mark.parametrize(
    ("num_gpus", "num_processes", "joined", "expected"),
    [(0, 0, None, 2), (0, 4, None, 4), (8, 0, None, 8), (8, 4, None, 4), (8, 0, 16, 16), (0, 4, 8, 8)],
)
def test_world_size(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, num_processes: int, joined: int | None, expected: int
) -> None:
    monkeypatch.setattr("launchers.local.launch_checks.count_gpus", lambda: num_gpus)
    config = compose_run(
        ["run=demo", f"launcher.num_processes={num_processes}", "train.global_batch_size=8", "engine=torch"]
    )
    layout = plan_layout(config, joined_world_size=joined)
    assert (layout.world_size, layout.on_gpu) == (expected, num_gpus > 0)


def test_description_names_every_size() -> None:
    config = compose_run(["run=m3_200k"])
    assert describe(config, Layout(world_size=128, on_gpu=True)) == (
        "m3_200k: 128 processes on GPUs = dp 2 x cp 16 x tp 1 x pp 4, ep 32; engine megatron; "
        "196608 tokens per sequence, 12288 per rank; m3 426.2B parameters, 23.3B active"
    )


def ended(rank: int, exit_code: int, time_s: float, error: str = "", here: bool = False) -> WorkerFailure:
    return WorkerFailure(
        rank=rank,
        pid=100 + rank,
        exit_code=exit_code,
        time_s=time_s,
        error=error,
        traceback="",
        ended_by_launcher=here,
        log=None,
    )


CLOSED = "RuntimeError: Connection closed by peer [127.0.0.1]:1234"
LOST = (
    "ExchangeError: layer 3, reducing gradients (grad): rank 1 has failed (...); rank 0 lost the others (eof)"
)
NO_MEMORY = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
TIMEOUT = "RuntimeError: Timed out waiting 5000ms for recv operation to complete"


@pytest.mark.parametrize(
    ("failures", "first"),
    [
        # two exceptions: the earlier one
        ([ended(0, 1, 10.2, "ValueError: a"), ended(1, 1, 10.1, "ValueError: b")], 1),
        # the peer of a killed rank raises before the kill is noticed
        ([ended(0, 1, 10.0, CLOSED), ended(1, -signal.SIGKILL, 10.1)], 1),
        ([ended(0, 1, 10.0, "RuntimeError: what?"), ended(1, -signal.SIGKILL, 10.1)], 1),
        # an exception, and a rank that hung and was killed
        ([ended(0, -signal.SIGKILL, 20.0, here=True), ended(1, 1, 10.0, "ValueError: b")], 1),
        ([ended(0, 1, 10.0, TIMEOUT), ended(1, -signal.SIGKILL, 20.0, here=True)], 0),
        # the others have lost a rank without memory, and end before it has told its story
        ([ended(0, 1, 10.0, LOST), ended(1, 1, 12.0, NO_MEMORY), ended(2, 1, 9.0, LOST)], 1),
        # a rank that leaves without a word, and one stopped for it
        ([ended(0, -signal.SIGTERM, 10.2, here=True), ended(1, 7, 10.1)], 1),
        # several break off, one of its own
        ([ended(0, 1, 10.0, CLOSED), ended(1, 1, 10.1, "ValueError: b"), ended(2, 1, 10.0, CLOSED)], 1),
    ],
)
def test_first_failure(failures: list[WorkerFailure], first: int) -> None:
    assert first_failure({failure.rank: failure for failure in failures}).rank == first


def test_report_says_how_the_others_ended() -> None:
    failures = [
        ended(0, 1, 10.0, CLOSED),
        ended(1, -signal.SIGKILL, 10.1),
        ended(2, -signal.SIGKILL, 20.0, here=True),
        ended(3, -signal.SIGTERM, 10.2, here=True),
    ]
    text = report({failure.rank: failure for failure in failures}, world_size=4)
    lines = text.splitlines()
    assert lines[0].startswith("msa-train: rank 1 of 4 failed: ended by SIGKILL (often")
    assert "pid 101" in lines[1]
    assert lines[2:5] == [
        f"  afterwards rank 0: {CLOSED}",
        "  afterwards rank 2: did not answer and was killed by the launcher",
        "  afterwards rank 3: stopped by the launcher",
    ]
