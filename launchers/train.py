"""Run msa-train: answer an option, or check a run and start its workers, or join those of torchrun or srun.

Three ways lead to workers. Alone, `_launch` starts all of them on this machine. As one task per node of a
Slurm step, `_launch_node` starts this node's. As one rank of torchrun or srun, `_join` becomes a worker.

All ranks that torchrun or srun started compose and check the configuration themselves, without torch; rank 0
alone claims run_dir, tokenizes, writes files and prints.
"""

import difflib
import functools
import importlib.metadata
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import NoReturn

from launchers.cli.command_line import INTERRUPTED, MACHINE_ERROR, USER_ERROR, leave
from launchers.cli.help import help_text
from launchers.cli.output import say, steady_output
from launchers.cli.quick_imports import quick_imports
from launchers.hydra_config.compose import EVERY_KEY, compose_run, config_to_yaml, known_keys
from launchers.local.job_environment import Node, joined_environment, joined_node, said_by
from launchers.local.kernel_checks import full_kernel_line, kernel_warning
from launchers.local.launch_checks import (
    Layout,
    check_files,
    describe,
    describe_stages,
    plan_layout,
    set_worker_environment,
)
from launchers.local.machine import accept_log_level, check_current_folder, check_loopback, raise_file_limit
from launchers.local.run_dir import CONFIG_NAME, claim_run_dir, disk_warning, write_config
from launchers.local.stage_starts import start_stages
from launchers.worker import TRAINING, run_entry
from msa_train.config import RunConfig, contradictions, one_line, plan_stages
from msa_train.config.environment import SAID_BY
from msa_train.runtime import preemption

OPTIONS = {
    "--help": "help",
    "-h": "help",
    "--version": "version",
    "--cfg": "cfg",
    "--check": "check",
    "--dry-run": "check",
}
CONFIG_DIR = "--config-dir"
# Under torchrun the first rank to leave ends the others: time for rank 0 to say why
OTHER_RANKS_WAIT_S = 3.0


@dataclass(frozen=True, slots=True)
class StartCommand:
    """Hold what tells a command that starts workers from another one."""

    name: str
    "as it is typed"
    entry: str
    "module:function that each worker calls with the configuration"
    help_text: Callable[[], str]
    "writes the answer to --help"
    adjust: Callable[[RunConfig], RunConfig] = lambda config: config
    "makes of the composed configuration that of the workers; raises ValueError"


TRAIN = StartCommand("msa-train", TRAINING, help_text)


def main(argv: Sequence[str] | None = None, command: StartCommand = TRAIN) -> int:
    """Run the command.

    Args:
        argv: arguments, those of the process by default.
        command: which one.

    Returns:
        Exit code: 0, 1 after a worker failed or where the output of an option is lost, 2 for bad input, 75 if
        asked to stop and saved (0 under torchrun and srun, which kill the others of a rank that ends
        otherwise), 128 + signal if stopped otherwise.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # options all print something, and nothing else; a run has more to show for itself
    trains = not any(text.startswith("-") and text in OPTIONS for text in arguments)
    warning = f"{command.name}: warning: stdout is lost, the run goes on"
    with steady_output(warning if trains else "") as output:
        code = _answer(arguments, command)
        output.flush()
        if not trains and output.error is not None and not code:
            say(f"{command.name}: error: stdout cannot be written ({output.error.strerror})", error=True)
            return MACHINE_ERROR
        return code


def _answer(arguments: list[str], command: StartCommand) -> int:
    """Turn what is raised into one line on stderr and an exit code."""
    try:
        check_current_folder()
        return _run(arguments, command)
    except ValueError as error:
        return _refuse(error, command)
    except OSError as error:
        say(f"{command.name}: error: {one_line(error)}", error=True)
        return MACHINE_ERROR
    except KeyboardInterrupt:
        say(f"{command.name}: stopped by SIGINT", error=True)
        return INTERRUPTED


def _run(arguments: list[str], command: StartCommand) -> int:
    """Answer the options in order of what they need: nothing, the configuration, the layout, the files."""
    arguments, config_dirs = _take_config_dirs(arguments)
    options = [_option(text) for text in arguments if text.startswith("-")]
    overrides = [text for text in arguments if not text.startswith("-")]
    if "help" in options:
        say(command.help_text(), lines=True)
        return 0
    if "version" in options:
        say(f"{command.name} {_version()}")
        return 0
    if not options:
        # the time is up soon, says Slurm: noted even now, acted on after the first step
        preemption.install_handlers(signal.SIGUSR1)
    config = command.adjust(compose_run(overrides, config_dirs))
    if "cfg" in options:
        keys = [text.partition("=")[2] for text in arguments if text.startswith("--cfg=")]
        values = "\n".join(_value(config, key) for key in keys)
        say(values or config_to_yaml(config).rstrip(), lines=True)
        return 0
    node = joined_node(os.environ)
    job = None if node else joined_environment(os.environ)
    joined = node.count * node.num_workers if node else int(job["WORLD_SIZE"]) if job else None
    if job:
        _tell_joined(job)
    layout = plan_layout(config, joined_world_size=joined)
    # now: the checks of files import torch, which reads the variables once
    set_worker_environment(config, layout)
    _check_machine(layout, on_one=joined is None or (node is not None and node.count == 1))
    if "check" in options:
        _warn(config, layout)
        check_files(config, say=say)
        say(describe(config, layout))
        for line in describe_stages(config, layout):
            say(line)
        if line := full_kernel_line(config, on_gpu=layout.on_gpu):
            say(line)
        return 0
    if node:
        return _launch_node(config, layout, node, command)
    return _join(config, layout, job, command) if job else _launch(config, layout, command)


def _check_machine(layout: Layout, *, on_one: bool) -> None:
    """Check and set what the machine must offer; on_one: all ranks are on it, so they meet over loopback."""
    accept_log_level()
    raise_file_limit(layout.world_size, on_gpu=layout.on_gpu)
    if on_one:
        check_loopback()


def _tell_joined(job: dict[str, str]) -> None:
    """Say that this process joins a job, and by which variables.

    Before any wait: they may be left over from another job, or those of an interactive shell, and then
    nobody else ever comes.
    """
    os.environ[SAID_BY] = said_by(os.environ)
    if job["RANK"] == "0":
        where, others = f"{job['MASTER_ADDR']}:{job['MASTER_PORT']}", int(job["WORLD_SIZE"]) - 1
        say(
            f"joining a job at {where} as rank 0, {others} more are to come: {os.environ[SAID_BY]} say so; "
            "unset these variables to train on this machine alone"
        )


def _launch(config: RunConfig, layout: Layout, command: StartCommand) -> int:
    """Start all workers on this machine and wait for them; returns the exit code."""
    with claim_run_dir(config.run_dir):
        _prepare(config, layout)
        # imports torch, which checks and help must not wait for
        with quick_imports():
            from launchers.local.elastic_agent import launch_workers

        path = write_config(config)
        return start_stages(
            config.run_dir, lambda: launch_workers(path, layout.world_size, entry=command.entry)
        )


def _launch_node(config: RunConfig, layout: Layout, node: Node, command: StartCommand) -> int:
    """Start this node's workers and wait for them; node 0 prepares run_dir for all.

    On 32 nodes of 8 GPUs this makes 32 launchers with 8 workers each. Only node 0 takes the lock and
    tokenizes; the others wait for it at the rendezvous, 600 s at most (RENDEZVOUS_S).
    """
    with quick_imports():
        from launchers.local.elastic_agent import launch_workers

    # the others wait for node 0 at the rendezvous, so they find what it has written
    if node.rank:
        path = Path(config.run_dir) / CONFIG_NAME
        return launch_workers(path, node.num_workers, entry=command.entry, node=node)
    with claim_run_dir(config.run_dir):
        _prepare(config, layout)
        return launch_workers(write_config(config), node.num_workers, entry=command.entry, node=node)


def _join(config: RunConfig, layout: Layout, job: dict[str, str], command: StartCommand) -> int:
    """Become one rank of a job that torchrun or srun started; rank 0 prepares run_dir for all."""
    os.environ.update(job)
    # The others wait for rank 0 at the rendezvous, launcher.timeout_s at most: --check tokenizes beforehand
    if job["RANK"] != "0":
        run_entry(config, command.entry)
        return 0
    with claim_run_dir(config.run_dir):
        _prepare(config, layout)
        write_config(config)
        if run_entry(config, command.entry) and "SLURM_STEP_ID" not in os.environ:
            say("the same command again goes on with it")
    return 0


def _prepare(config: RunConfig, layout: Layout) -> None:
    """Print what the run is, warn, and check its files; by the holder of run_dir."""
    say(describe(config, layout))
    for line in describe_stages(config, layout):
        if not line.startswith(" "):
            say(line)
    _warn(config, layout, disk_warning(config))
    check_files(config, say=say, hand_on=True)


def _warn(config: RunConfig, layout: Layout, disk: str | None = None) -> None:
    """Print settings that contradict each other and slow kernels to stdout, too small a disk to stderr."""
    # tiles have a largest number of blocks
    attention = replace(config.attention, topk=max(stage.topk for stage in plan_stages(config)))
    slow = kernel_warning(replace(config, attention=attention), on_gpu=layout.on_gpu)
    for text in (*contradictions(config), *([slow] if slow else [])):
        # allowed, and meant by who tries a few steps: said with what else the run is
        say(f"warning: {text}")
    if disk:
        say(f"msa-train: warning: {disk}", error=True)


def _take_config_dirs(arguments: list[str]) -> tuple[list[str], list[Path]]:
    """Split off `--config-dir DIR` and `--config-dir=DIR`.

    Example: ["run=demo", "--config-dir", "mine"] -> ["run=demo"], [Path("mine")].
    """
    rest: list[str] = []
    folders: list[Path] = []
    left = iter(arguments)
    for text in left:
        name, equals, value = text.partition("=")
        if name != CONFIG_DIR:
            rest.append(text)
            continue
        folder = value if equals else next(left, "")
        if not folder:
            raise ValueError(f"{CONFIG_DIR}: a folder must follow; use {CONFIG_DIR} DIR")
        folders.append(Path(folder).expanduser())
    return rest, folders


def _value(config: RunConfig, key: str) -> str:
    """Write one value as scripts want it: without quotes, names of choices as they are written.

    Example: "train.precision" -> "bf16", for the batch script's `$(msa-train ... --cfg=run_dir)`.
    """
    if key not in known_keys(list(config.stages)):
        raise ValueError(f"--cfg={key}: there is no such key; {EVERY_KEY}")
    value = functools.reduce(
        lambda part, name: part[name] if isinstance(part, dict) else getattr(part, name),
        key.split("."),
        config,
    )
    return str(value.value if isinstance(value, Enum) else value)


def _option(text: str) -> str:
    """Find the option that a text stands for: "--dry-run" -> "check", "--cfg=run_dir" -> "cfg"."""
    if text.startswith("--cfg="):
        return "cfg"
    if text not in OPTIONS:
        known = [*OPTIONS, CONFIG_DIR]
        match = difflib.get_close_matches(text.partition("=")[0], known, n=1)
        hint = f"did you mean {match[0]}?" if match else f"the options are {', '.join(known)}"
        raise ValueError(f"{text}: there is no such option; {hint}")
    return OPTIONS[text]


def _refuse(error: ValueError, command: StartCommand) -> int:
    """Print why the run is refused, once per job where that can be done; returns USER_ERROR."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        # All ranks find the same mistake. Rank 0 says it, and its end is that of all; where this process
        # outlives the wait, it is no rank of a job, and says it itself.
        time.sleep(OTHER_RANKS_WAIT_S)
    say(f"{command.name}: error: {one_line(error)}", error=True)
    return USER_ERROR


def _version() -> str:
    """Read the version of the installed package."""
    try:
        return importlib.metadata.version("msa-train")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def command() -> NoReturn:
    """Run the command as a process of its own."""
    leave(main())


if __name__ == "__main__":
    command()
