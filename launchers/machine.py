"""What a machine must offer before workers start: open files, the loopback interface, a current folder."""

import logging
import os
import resource
import socket

# Descriptors of a rank on the CPU, most of them gloo's: 100 with 2 ranks, 105 with 4, up to 120 with 8 (28 to
# 47 of them sockets), so 4 for one more rank. Each group has a listening socket, an epoll and more, and a
# socket to each rank that it talks to, at most to all, as the groups of tensor and pipeline parallelism may:
# hence 10. On GPUs one group, for checkpoints, is gloo's.
_FILES, _FILES_PER_RANK, _FILES_PER_GPU_RANK = 128, 10, 1
_MOST_FILES = 2**20
_CONNECT_S = 10.0


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


def raise_file_limit(num_ranks: int, *, on_gpu: bool) -> None:
    """Allow this process and its workers as many open files as the system permits.

    Args:
        num_ranks: of the job.
        on_gpu: whether they compute on GPUs.

    Raises:
        ValueError: if that is too few.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    needed = _FILES + (_FILES_PER_GPU_RANK if on_gpu else _FILES_PER_RANK) * num_ranks
    if most < needed:
        raise ValueError(
            f"ulimit -n={most}: a rank of {num_ranks} may have {needed} files and sockets open; use "
            f"ulimit -n {max(1024, 2 * needed)}, /etc/security/limits.conf or the container's --ulimit nofile"
        )


def check_loopback() -> None:
    """Check that workers of one machine can connect.

    Raises:
        OSError: if the loopback interface is down or missing, as in a new network namespace.
    """
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=_CONNECT_S).close()
    except OSError as error:
        raise OSError(
            f"lo: nothing can connect over the loopback interface ({error.strerror or error}), as workers of "
            "one machine do; bring it up: ip link set lo up"
        ) from error


def accept_log_level() -> None:
    """Make LOGLEVEL one that torch understands: at others, such as `info`, it ends when imported."""
    level = os.environ.get("LOGLEVEL", "").strip().upper()
    if level in logging.getLevelNamesMapping() or level.isdecimal():
        os.environ["LOGLEVEL"] = level
    else:
        os.environ.pop("LOGLEVEL", None)
