"""Stands in for msa-train where only the batch script is tested: no torch, the same signs and codes.

python slurm_stand_in.py run_dir=DIR steps=N [crash_at=N] [stage_at=N]: a step takes 0.1 s; asked to stop, it
saves. After step stage_at it saves, and stage "long" is for processes that are started for it.
"""

import os
import signal
import sys
import time
from pathlib import Path

from msa_train.runtime import preemption
from msa_train.runtime.next_stage import NextStage, asked_stage, write_next

STEP_S = 0.1


def main(arguments: list[str]) -> int:
    """Make steps on every task; the first one saves."""
    settings = dict(text.split("=") for text in arguments)
    preemption.install_handlers()
    run_dir, rank = Path(settings["run_dir"]), int(os.environ["SLURM_PROCID"])
    start = f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT') or 0}"
    checkpoints = run_dir / "checkpoints"
    step = max((int(path.name.removeprefix("step_")) for path in checkpoints.glob("step_*")), default=0)
    assert (asked_stage() == "long") is (step > 0 and step == int(settings.get("stage_at", "-1")))
    while step < int(settings["steps"]):
        step += 1
        time.sleep(STEP_S)
        print(f"step {step}", flush=True)
        if step == int(settings.get("crash_at", "-1")):
            return 1
        if step == int(settings.get("stage_at", "-1")):
            if rank == 0:
                (checkpoints / f"step_{step:08d}").mkdir(parents=True)
                write_next(run_dir, NextStage(step=step, stage="long", generation=start))
            return 0
        # ranks of a real run stop together or not at all: none can once another one has crashed
        if preemption.signal_received() and "crash_at" not in settings:
            if rank == 0:
                (checkpoints / f"step_{step:08d}").mkdir(parents=True)
                name = signal.Signals(preemption.signal_received()).name
                preemption.write_stopped(
                    run_dir, preemption.StopRecord(step=step, signal=name, saved=True, generation=start)
                )
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
