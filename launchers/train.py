"""The msa-train command."""

import difflib
import importlib.metadata
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from launchers.command_line import INTERRUPTED, USER_ERROR, leave
from launchers.compose import compose_run, config_to_yaml
from launchers.help import help_text
from launchers.join import Node, joined_environment, joined_node
from launchers.preflight import Layout, check_files, describe, plan_layout, set_worker_environment
from launchers.run_dir import CONFIG_NAME, claim_run_dir, disk_warning, write_config
from launchers.worker import run_entry
from msa_train.config import RunConfig
from msa_train.training import stop

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments, those of the process by default.

    Returns:
        Exit code: 0, 1 after a worker failed, 2 for bad input, 75 if asked to stop and saved (0 under
        torchrun and srun, which kill the others of a rank that ends otherwise), 128 + signal if stopped
        otherwise.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except ValueError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        print("msa-train: stopped by SIGINT", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # `msa-train --help | head`; the interpreter must not try to flush again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(arguments: list[str]) -> int:
    arguments, config_dirs = _take_config_dirs(arguments)
    options = [_option(text) for text in arguments if text.startswith("-")]
    overrides = [text for text in arguments if not text.startswith("-")]
    if "help" in options:
        print(help_text(), flush=True)
        return 0
    if "version" in options:
        print(f"msa-train {_version()}", flush=True)
        return 0
    if not options:
        # the time is up soon, says Slurm: noted even now, acted on after the first step
        stop.listen(signal.SIGUSR1)
    config = compose_run(overrides, config_dirs)
    if "cfg" in options:
        print(config_to_yaml(config), end="", flush=True)
        return 0
    node = joined_node(os.environ)
    job = None if node else joined_environment(os.environ)
    joined = node.count * node.num_workers if node else int(job["WORLD_SIZE"]) if job else None
    layout = plan_layout(config, joined_world_size=joined)
    set_worker_environment(config, layout)
    if "check" in options:
        check_files(config, say=_say)
        _say(describe(config, layout))
        return 0
    if node:
        return _launch_node(config, layout, node)
    return _join(config, layout, job) if job else _launch(config, layout)


def _launch(config: RunConfig, layout: Layout) -> int:
    with claim_run_dir(config.run_dir):
        _prepare(config, layout)
        # imports torch, which checks and help must not wait for
        from launchers.local import launch_workers

        return launch_workers(write_config(config), layout.world_size)


def _launch_node(config: RunConfig, layout: Layout, node: Node) -> int:
    from launchers.local import launch_workers

    # the others wait for node 0 at the rendezvous, so they find what it has written
    if node.rank:
        return launch_workers(Path(config.run_dir) / CONFIG_NAME, node.num_workers, node=node)
    with claim_run_dir(config.run_dir):
        _prepare(config, layout)
        return launch_workers(write_config(config), node.num_workers, node=node)


def _join(config: RunConfig, layout: Layout, job: dict[str, str]) -> int:
    os.environ.update(job)
    # The others wait for rank 0 at the rendezvous, launcher.timeout_s at most: --check tokenizes beforehand
    if job["RANK"] != "0":
        run_entry(config)
        return 0
    with claim_run_dir(config.run_dir):
        _prepare(config, layout)
        write_config(config)
        run_entry(config)
    return 0


def _prepare(config: RunConfig, layout: Layout) -> None:
    _say(describe(config, layout))
    warning = disk_warning(config)
    if warning:
        print(f"msa-train: warning: {warning}", file=sys.stderr, flush=True)
    check_files(config, say=_say, hand_on=True)


def _take_config_dirs(arguments: list[str]) -> tuple[list[str], list[Path]]:
    """Split off `--config-dir DIR` and `--config-dir=DIR`."""
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


def _option(text: str) -> str:
    if text not in OPTIONS:
        known = [*OPTIONS, CONFIG_DIR]
        match = difflib.get_close_matches(text.partition("=")[0], known, n=1)
        hint = f"did you mean {match[0]}?" if match else f"the options are {', '.join(known)}"
        raise ValueError(f"{text}: there is no such option; {hint}")
    return OPTIONS[text]


def _refuse(error: ValueError) -> int:
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        time.sleep(OTHER_RANKS_WAIT_S)
        return USER_ERROR
    print(f"msa-train: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return USER_ERROR


def _say(message: str) -> None:
    print(message, flush=True)


def _version() -> str:
    try:
        return importlib.metadata.version("msa-train")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def command() -> NoReturn:
    """Run the command as a process of its own."""
    leave(main())


if __name__ == "__main__":
    command()
