"""A process without progress is ended and says where it stood."""

import subprocess
import sys

from msa_train.runtime.watchdog import HUNG

PROGRAM = """
import time
from msa_train.runtime.watchdog import Watchdog

def stuck():
    time.sleep(60)

with Watchdog({timeout}, "rank 3") as watchdog:
    for step in range(5):
        watchdog.beat(f"step {{step}}")
        time.sleep(0.1)
    {end}
time.sleep(1)
print("ended well")
"""


def _run(timeout: float, end: str) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(timeout=timeout, end=end)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


def test_hang_is_ended_with_all_stacks() -> None:
    done = _run(0.5, "stuck()")
    assert done.returncode == HUNG
    assert "rank 3: no progress for" in done.stderr
    assert "since step 4 (watchdog.timeout_s=0.5)" in done.stderr
    assert "in stuck" in done.stderr


def test_progress_and_a_good_end_are_left_alone() -> None:
    for timeout in (0.5, 0):
        done = _run(timeout, "pass")
        assert (done.returncode, done.stdout) == (0, "ended well\n"), done.stderr
