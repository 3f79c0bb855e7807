"""Run msa-eval: evaluate a checkpoint with long-context tasks, on the processes that a training would have.

It composes a run as msa-train does and starts the same workers; they load weights in place of training.
Results stand in run_dir/evaluation.jsonl, what the command itself leaves (settings, logs) in
run_dir/evaluation.
"""

import sys
from pathlib import Path
from typing import NoReturn

from launchers.cli.command_line import leave
from launchers.cli.help import OPTIONS
from launchers.train import StartCommand, main
from msa_train.config import RunConfig
from msa_train.config.evaluation.settings import TASK_NAMES

ENTRY = "msa_train.training.evaluation_worker:run_evaluation"
FOLDER = "evaluation"
_TEXT = """\
msa-eval run=NAME [checkpoint.load=PATH] [evaluation=OPTION] [KEY=VALUE ...] [--check | --cfg]

Evaluates the newest checkpoint of run_dir, or that of checkpoint.load, in any layout: needles and other tasks
whose answers are known, losses by position, gains from context. The model reads the right answer and is
asked for each of its tokens (teacher-forced): one forward pass, no decoding. Results go to
run_dir/evaluation.jsonl, TensorBoard and the terminal."""
_KEYS = """\
keys used most (all of them: msa-eval run=demo --cfg=evaluation):
  evaluation.tasks=NAMES      comma-separated, or patterns as niah_*
  evaluation.lengths=N,N      tokens of a sample, as 4096,128K; default: the run's longest pack
  evaluation.samples=N        of each task and length; 100 tell a share to within 10 points
  evaluation.held_out_packs=N loss by position and gain from context on that many packs
  evaluation.templates=PATH   a clone of NVIDIA/RULER, for its own wording"""
_EXAMPLE = """\
example:
  msa-eval run=demo evaluation.tasks='niah_*,vt' evaluation.lengths=2048,8192 evaluation.samples=25"""


def help_text() -> str:
    """Write usage, tasks, keys and options."""
    tasks = f"tasks:\n  {', '.join(TASK_NAMES)}"
    return "\n\n".join([_TEXT, tasks, _KEYS, OPTIONS, _EXAMPLE])


def of_evaluation(config: RunConfig) -> RunConfig:
    """Make of a run's settings those of its evaluation.

    The folder is one of its own: the run that is evaluated may still be going on, and keeps its settings.

    Example: run_dir=runs/demo -> run_dir=runs/demo/evaluation, checkpoint.load=runs/demo.
    """
    config.checkpoint.load = config.checkpoint.load or config.run_dir
    config.checkpoint.load_weights_only, config.checkpoint.every = True, 0
    config.run_dir = str(Path(config.run_dir) / FOLDER)
    # checked before anything starts, and loaded, as where a training evaluates
    config.evaluation.every = config.evaluation.every or 1
    return config


EVALUATE = StartCommand("msa-eval", ENTRY, help_text, of_evaluation)


def command() -> NoReturn:
    """Run the command as a process of its own."""
    leave(main(sys.argv[1:], EVALUATE))


if __name__ == "__main__":
    command()
