"""Ranks that come together in a store, and those that do not: who is missing, and which variables said so."""

import socket
import threading
from pathlib import Path

import pytest

from msa_train.config.environment import SAID_BY, STORE_FILE
from msa_train.parallel.comm import job_store
from msa_train.parallel.comm.job_store import JobIncompleteError, open_store


def environment(rank: int, world_size: int, **more: str) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(world_size), **more}


def test_ranks_of_one_machine_meet_in_a_file(tmp_path: Path) -> None:
    said: list[str] = []
    stores = {}

    def join(rank: int) -> None:
        environ = environment(rank, 3, **{STORE_FILE: str(tmp_path / "store")})
        stores[rank] = open_store(environ, timeout_s=60, say=said.append)

    threads = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    stores[0].set("key", "value")
    assert stores[2].get("key") == b"value"
    assert said == []


def test_rank_0_names_who_is_missing(tmp_path: Path) -> None:
    environ = environment(0, 3, **{STORE_FILE: str(tmp_path / "store")})
    with pytest.raises(JobIncompleteError, match=r"^RANK=0: ranks 1, 2 did not come within launcher"):
        open_store(environ, timeout_s=0.2, say=print)


def test_at_256_ranks_a_few_are_named(tmp_path: Path) -> None:
    environ = environment(0, 256, **{STORE_FILE: str(tmp_path / "store")})
    with pytest.raises(JobIncompleteError, match=r"ranks 1, 2, 3, 4, 5, 6, 7, 8 and 247 more did not"):
        open_store(environ, timeout_s=0.0, say=print)


def test_leftover_variables_are_named_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_store, "SAY_AFTER_S", 0.05)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, SAID_BY: "SLURM_NTASKS=4"}
    for rank, whom in ((0, "ranks 1, 2, 3"), (2, f"the store of rank 0 at 127.0.0.1:{port}")):
        said: list[str] = []
        with pytest.raises(
            JobIncompleteError, match=rf"{whom} .* said by SLURM_NTASKS=4; start all of them, or"
        ):
            open_store(environment(rank, 4, **here), timeout_s=0.6, say=said.append)
        assert said == [
            f"rank {rank} of 4 waits for {whom}; that it is one of 4 is said by SLURM_NTASKS=4"
        ], said
