"""What a machine must offer before workers start: open files, the loopback interface, a current folder."""

import logging
import os
import resource
from pathlib import Path

# Descriptors of a rank on the CPU: 107 with 2 ranks were counted, most of them gloo's. Each of its groups has
# a listening socket, an epoll and more, and a socket to each other rank.
_FILES, _FILES_PER_RANK = 128, 10
_MOST_FILES = 2**20
_IFF_UP = 1


def check_current_folder() -> None:
    """Check that relative paths mean something.

    Raises:
        ValueError: if the current folder was removed.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise ValueError(
            f"the current folder cannot be used ({error.strerror}): it was removed; cd into another one"
        ) from error


def expand_user(name: str, path: str) -> str:
    """Replace a leading ~ of a setting.

    Raises:
        ValueError: where there is no home, as for a user without an entry in passwd, in a container.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and expanded.partition("/")[0] == path.partition("/")[0]:
        user = path.partition("/")[0]
        why = f"user id {os.getuid()} has no home folder" if user == "~" else f"there is no user {user[1:]}"
        raise ValueError(f"{name}={path}: {why}; set HOME, or use {name}=/a/path")
    return expanded


def raise_file_limit(num_ranks: int) -> None:
    """Allow this process and its workers as many open files as the system permits.

    Args:
        num_ranks: of the job.

    Raises:
        ValueError: if that is too few.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    needed = _FILES + _FILES_PER_RANK * num_ranks
    if most < needed:
        raise ValueError(
            f"ulimit -n={most}: a rank of {num_ranks} has about {needed} files and sockets open; use "
            f"ulimit -n {max(1024, 2 * needed)}, /etc/security/limits.conf or the container's --ulimit nofile"
        )


def check_loopback(folder: Path = Path("/sys/class/net/lo")) -> None:
    """Check that workers of one machine can connect.

    Raises:
        OSError: if the loopback interface is down.
    """
    try:
        flags = int((folder / "flags").read_text(), 16)
    except (OSError, ValueError):
        # another system, or no /sys: connecting will show it
        return
    if not flags & _IFF_UP:
        raise OSError(
            "lo: the loopback interface is down, and workers of one machine connect over it; bring it up: "
            "ip link set lo up"
        )


def accept_log_level() -> None:
    """Make LOGLEVEL one that torch understands: at others, such as `info`, it ends when imported."""
    level = os.environ.get("LOGLEVEL", "").strip().upper()
    if level in logging.getLevelNamesMapping() or level.isdecimal():
        os.environ["LOGLEVEL"] = level
    else:
        os.environ.pop("LOGLEVEL", None)
