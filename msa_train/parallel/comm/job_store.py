"""Open the store in which the ranks of a job meet: a private file on one machine, TCP between several."""

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

from torch.distributed import FileStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from msa_train.config.environment import SAID_BY, STORE_FILE

# Seconds between looks for missing ranks, and until it is said for whom a rank waits.
POLL_S, SAY_AFTER_S = 0.5, 10.0
_AGENT_HOSTS = "TORCHELASTIC_USE_AGENT_STORE"
_NAMED_RANKS = 8


class JobIncompleteError(RuntimeError):
    """Tell that the ranks of a job did not come together; the text names who is missing, and what to do."""


def open_store(environ: Mapping[str, str], *, timeout_s: float, say: Callable[[str], None]) -> Store:
    """Open the store of the job and wait until all of its ranks have done so.

    Rank 0 looks for each missing rank, the others for one key that it sets: a look costs a few requests, at
    256 ranks too.

    Args:
        environ: has RANK, WORLD_SIZE, and MASTER_ADDR and MASTER_PORT or STORE_FILE.
        timeout_s: longest wait, in seconds.
        say: is told once for whom this rank waits, if that takes longer than SAY_AFTER_S.

    Raises:
        JobIncompleteError: if not all have come in time.
    """
    rank, world_size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    deadline = time.monotonic() + timeout_s
    store = _connect(environ, rank, world_size, deadline, say)
    store.set_timeout(timedelta(seconds=timeout_s))
    meeting = PrefixStore("msa_train_meeting", store)
    meeting.set(f"rank_{rank}", "1")
    absent = [f"rank_{other}" for other in range(world_size)] if rank == 0 else ["all"]
    say_at = time.monotonic() + SAY_AFTER_S
    while absent := _still_absent(meeting, absent):
        whom = _ranks(absent) if rank == 0 else "rank 0, or others for whom that one waits"
        if time.monotonic() > deadline:
            raise JobIncompleteError(_incomplete(environ, whom))
        if time.monotonic() > say_at:
            say(f"rank {rank} of {world_size} waits for {whom}; {_origin(environ)}")
            say_at = deadline + 1
        # Ranks of one machine are there at once; many ranks must not flood the store.
        time.sleep(POLL_S if world_size > 8 else POLL_S / 10)
    if rank == 0:
        meeting.set("all", "1")
    return store


def _connect(
    environ: Mapping[str, str], rank: int, world_size: int, deadline: float, say: Callable[[str], None]
) -> Store:
    if environ.get(STORE_FILE):
        return FileStore(environ[STORE_FILE], world_size)
    host, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    hosts = rank == 0 and environ.get(_AGENT_HOSTS) != str(True)
    if not hosts:
        # torch's own wait is deaf to Ctrl-C and fills the terminal with C++ stacks
        _wait_for_port(environ, f"rank {rank} of {world_size}", deadline, say)
    left = timedelta(seconds=max(deadline - time.monotonic(), 1.0))
    try:
        return TCPStore(host, port, world_size, hosts, left, wait_for_workers=False, multi_tenant=True)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0][:200]
        raise JobIncompleteError(f"MASTER_PORT={port}: no store at {host}:{port} ({reason})") from error


def _wait_for_port(environ: Mapping[str, str], me: str, deadline: float, say: Callable[[str], None]) -> None:
    address = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    whom, say_at = f"the store of rank 0 at {address[0]}:{address[1]}", time.monotonic() + SAY_AFTER_S
    while True:
        try:
            socket.create_connection(address, timeout=SAY_AFTER_S).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise JobIncompleteError(f"{_incomplete(environ, whom)} ({error})") from error
        if time.monotonic() > say_at:
            say(f"{me} waits for {whom}; {_origin(environ)}")
            say_at = deadline + SAY_AFTER_S
        time.sleep(POLL_S / 5)


def _still_absent(store: Store, keys: Sequence[str]) -> list[str]:
    # FileStore and TCPStore answer for all keys at once; most often all are there
    return [] if store.check(list(keys)) else [key for key in keys if not store.check([key])]


def _ranks(keys: Sequence[str]) -> str:
    """Name ranks by their keys: ["rank_1", "rank_3"] -> "ranks 1, 3"."""
    numbers = [key.removeprefix("rank_") for key in keys]
    more = f" and {len(numbers) - _NAMED_RANKS} more" if len(numbers) > _NAMED_RANKS else ""
    return f"rank{'s' * (len(numbers) > 1)} {', '.join(numbers[:_NAMED_RANKS])}{more}"


def _origin(environ: Mapping[str, str]) -> str:
    if environ.get(STORE_FILE):
        return "their output is in run_dir/logs"
    return f"that it is one of {environ['WORLD_SIZE']} is said by {environ.get(SAID_BY) or 'WORLD_SIZE'}"


def _incomplete(environ: Mapping[str, str], whom: str) -> str:
    return (
        f"RANK={environ['RANK']}: {whom} did not come within launcher.timeout_s; {_origin(environ)}; start "
        "all of them, or unset these variables to train on this machine alone"
    )
