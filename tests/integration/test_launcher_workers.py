"""Real elastic launches of a small worker: output, failures, signals, and nothing left behind."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from launchers.compose import compose_run
from launchers.run_dir import claim_run_dir, write_config

ROOT = Path(__file__).parents[2]
# what a user is promised when a worker dies
DOWN_WITHIN_S = 30
START_WITHIN_S = 120

Start = Callable[..., "Launch"]


class Launch:
    """A running launcher with two workers."""

    def __init__(self, run_dir: Path, behaviour: str, overrides: tuple[str, ...], stdout: int) -> None:
        self.run_dir = run_dir
        config = compose_run(["run=smoke", f"run_dir={run_dir}", "train.steps=100000", *overrides])
        claim_run_dir(config.run_dir).close()
        environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "TEST_WORKER": behaviour}
        environ["OMP_NUM_THREADS"] = "1"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.launcher_start", str(write_config(config)), "2"],
            cwd=ROOT,
            env=environ,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_steps(self) -> list[int]:
        """Process ids of the workers, once both have done some steps."""
        deadline = time.monotonic() + START_WITHIN_S
        while time.monotonic() < deadline:
            if all((self.run_dir / f"step{rank}").exists() for rank in range(2)):
                return [int((self.run_dir / f"pid{rank}").read_text()) for rank in range(2)]
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)
        raise AssertionError("the workers did not start")

    def end(self, timeout: float) -> tuple[int, str, str]:
        """Exit code and output, once the launcher has ended."""
        output, errors = self.process.communicate(timeout=timeout)
        return self.process.returncode, output or "", errors

    def clean_up(self) -> None:
        """End what a failed test left."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    launches: list[Launch] = []

    def begin(behaviour: str = "", overrides: tuple[str, ...] = (), stdout: int = subprocess.PIPE) -> Launch:
        launches.append(Launch(tmp_path / "run", behaviour, overrides, stdout))
        return launches[-1]

    yield begin
    for launch in launches:
        launch.clean_up()


def wait_gone(pids: list[int], timeout: float = DOWN_WITHIN_S) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if not any(is_running(pid) for pid in pids):
            return
        time.sleep(0.05)
    raise AssertionError(f"still running: {[pid for pid in pids if is_running(pid)]}")


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_workers_end_well(start: Start) -> None:
    launch = start(overrides=("train.steps=3",))
    code, output, errors = launch.end(START_WITHIN_S)
    assert code == 0, errors
    assert "rank 0 starts" in output
    assert "rank 0 ends" in output
    assert "rank 1" not in output
    (log,) = launch.run_dir.glob("logs/*/rank1.out")
    assert "rank 1 ends" in log.read_text()


def test_rank_0_keeps_the_terminal(start: Start) -> None:
    controller, terminal = pty.openpty()
    launch = start(overrides=("train.steps=3",), stdout=terminal)
    os.close(terminal)
    code, _, errors = launch.end(START_WITHIN_S)
    assert code == 0, errors
    assert b"rank 0 starts; terminal: True" in os.read(controller, 4096)
    os.close(controller)


@pytest.mark.parametrize("behaviour", ["raise", "full disk"])
def test_exception_is_shown_with_rank_and_traceback(start: Start, behaviour: str) -> None:
    """Also where there is no room for it in run_dir."""
    launch = start(behaviour)
    pids = launch.wait_for_steps()
    code, _, errors = launch.end(DOWN_WITHIN_S)
    assert code == 1
    first_line = errors.splitlines()[0]
    assert first_line == "msa-train: rank 1 of 2 failed: RuntimeError: the loss of rank 1 is not finite"
    assert f"rank 1, local rank 1, pid {pids[1]}, host " in errors
    assert errors.count("Traceback (most recent call last)") == 1
    assert "_misbehave(behaviour)" in errors
    wait_gone(pids)


def test_nobody_else_can_reach_the_stores(start: Start) -> None:
    launch = start()
    workers = [psutil.Process(pid) for pid in launch.wait_for_steps()]
    store = Path(workers[0].environ()["MSA_TRAIN_STORE"])
    assert store.is_file()
    assert store.parent.stat().st_mode & 0o777 == 0o700
    for process in (psutil.Process(launch.process.pid), *workers):
        listening = [item.laddr.ip for item in process.net_connections() if item.status == psutil.CONN_LISTEN]
        assert set(listening) <= {"127.0.0.1", "::1"}, (process, listening)
        # gloo's, of the workers; the agent needs none
        assert bool(listening) == (process in workers)
    launch.process.terminate()
    launch.end(DOWN_WITHIN_S)
    assert not store.parent.exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_worker_takes_the_job_down(start: Start, rank: int) -> None:
    launch = start()
    pids = launch.wait_for_steps()
    os.kill(pids[rank], signal.SIGKILL)
    code, _, errors = launch.end(DOWN_WITHIN_S)
    assert code == 1
    assert errors.startswith(f"msa-train: rank {rank} of 2 failed: ended by SIGKILL"), errors
    assert f"afterwards rank {1 - rank}:" in errors
    wait_gone(pids)


def test_silent_exit_shows_what_the_rank_wrote_last(start: Start) -> None:
    code, _, errors = start("exit").end(START_WITHIN_S)
    assert code == 1
    assert errors.startswith("msa-train: rank 1 of 2 failed: exit code 7\n"), errors
    assert "rank 1 leaves without a word" in errors


def test_segmentation_fault_shows_the_python_stack(start: Start) -> None:
    code, _, errors = start("segfault").end(START_WITHIN_S)
    assert code == 1
    assert errors.startswith("msa-train: rank 1 of 2 failed: ended by SIGSEGV\n"), errors
    assert "in _misbehave" in errors


def test_stopped_worker_is_ended_by_the_collective_timeout(start: Start) -> None:
    launch = start("stop", overrides=("launcher.timeout_s=5",))
    pids = launch.wait_for_steps()
    code, _, errors = launch.end(5 + DOWN_WITHIN_S)
    assert code == 1
    first_line = errors.splitlines()[0]
    assert first_line.startswith("msa-train: rank 0 of 2 failed: ExchangeError: "), errors
    assert "rank 1 does not answer and is dead or stalled" in first_line
    assert "afterwards rank 1: did not answer" in errors
    wait_gone(pids)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_launcher(start: Start, signal_number: signal.Signals) -> None:
    launch = start()
    pids = launch.wait_for_steps()
    launch.process.send_signal(signal_number)
    code, _, errors = launch.end(DOWN_WITHIN_S)
    wait_gone(pids)
    if signal_number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == 128 + signal_number
        assert errors == f"msa-train: stopped by {signal_number.name}\n"
