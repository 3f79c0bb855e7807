"""Let the workers of one machine meet where no other user of it can open, change or connect to anything.

torch's own ways listen on all addresses, and its c10d rendezvous keeps a pickle in that store: who reaches
the port runs code as the user. Here the agent, alone, needs no more than a store in its memory, and the
workers share a file in a folder of mode 0700.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo


class OneMachine(RendezvousHandler):
    """Be the rendezvous of an agent that is alone in its job: no store outside its memory, no port."""

    def __init__(self, run_id: str) -> None:
        """Take the name that torch gives to the run in its logs."""
        self._run_id = run_id
        self._store = HashStore()

    def get_backend(self) -> str:
        """Return the name of this kind of rendezvous, for torch's logs."""
        return "one-machine"

    def next_rendezvous(self) -> RendezvousInfo:
        """Return at once: this agent has rank 0 of 1. Workers are given no address, but STORE_FILE."""
        return RendezvousInfo(self._store, 0, 1, RendezvousStoreInfo("127.0.0.1", 0))

    def is_closed(self) -> bool:
        """Return False: torch asks before a restart, and there are none."""
        return False

    def set_closed(self) -> None:
        """Do nothing: no other agent would learn of it."""

    def num_nodes_waiting(self) -> int:
        """Return 0: no other agent can come."""
        return 0

    def get_run_id(self) -> str:
        """Return the name of the run."""
        return self._run_id

    def shutdown(self) -> bool:
        """Return True: there is nothing to be closed."""
        return True


@contextmanager
def private_store() -> Iterator[Path]:
    """Give the path of a file for FileStore in a folder of mode 0700, which is removed at the end.

    Raises:
        OSError: if there is no folder for temporary files.
    """
    # mkdtemp takes a name that nobody can have prepared, and mode 0700
    folder = Path(tempfile.mkdtemp(prefix="msa_train-"))
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # what cleans /tmp of old files leaves locked folders alone; a run may last for weeks
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield folder / "store"
    finally:
        os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)
