"""Start the processes of one stage after those of another, on this machine.

    workers    train their last step, save, leave run_dir/next_stage.json and end with NEXT_STAGE
    here       read it, and start as many workers for the stage that it names
    workers    are laid out for that stage and go on from the checkpoint, which any layout reads

The lock of run_dir and the fencing token stay with this process, so to other starts it is one. In a Slurm job
the batch script does the same with steps of srun (slurm/train.sbatch).
"""

import os
from collections.abc import Callable

from launchers.cli.command_line import NEXT_STAGE, STOPPED
from launchers.cli.output import say
from msa_train.runtime import preemption
from msa_train.runtime.fencing import own_token
from msa_train.runtime.next_stage import VARIABLE, NextStage, clear_next, read_next


def start_stages(run_dir: str, start: Callable[[], int]) -> int:
    """Start workers until the last stage is over, or a start ends otherwise.

    Args:
        run_dir: of the run, held by this process.
        start: starts all workers, waits for them, returns an exit code.

    Returns:
        The last exit code.

    Raises:
        ValueError: if workers end twice for the same stage, or left nothing to go on from.
    """
    last: NextStage | None = None
    # left over from an earlier run of this process, or set by a user
    os.environ.pop(VARIABLE, None)
    while True:
        clear_next(run_dir)
        code = start()
        if code != NEXT_STAGE:
            return code
        mark = read_next(run_dir)
        if mark is None or mark == last:
            raise ValueError(
                f"run_dir={run_dir}: the workers ended for another stage, and {_problem(mark)}; start again"
            )
        if number := preemption.signal_received():
            return _stop(run_dir, mark, number)
        last, os.environ[VARIABLE] = mark, mark.stage


def _problem(mark: NextStage | None) -> str:
    if mark is None:
        return "next_stage.json does not say which"
    return f"those of {mark.stage} did so again at step {mark.step}"


def _stop(run_dir: str, mark: NextStage, number: int) -> int:
    """End between two stages, as asked: all is saved."""
    name = preemption.signal_name(number)
    stopped = preemption.StopRecord(step=mark.step, signal=name, saved=True, generation=own_token())
    preemption.write_stopped(run_dir, stopped)
    say(f"stopped by {name} after step {mark.step}: another start goes on from here")
    return STOPPED
