"""Who is missing when an exchange between ranks breaks.

A rank whose collective fails says so in the job's store. A thread of every rank looks there now and then and
answers where its rank stands, even while the rank itself is blocked in a collective. Who does not answer
within a short grace is dead or stalled, and is named in the error of all others.
"""

import json
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

# Seconds between looks at the store, and until a rank that does not answer counts as missing.
POLL_S = 0.5
GRACE_S = 10.0

# What a purpose of `CpComm` is called in messages.
_POINTS = {
    "index_key": "gathering index keys",
    "index_key_grad": "returning gradients of index keys",
    "request_shape": "comparing shapes of block requests",
    "request": "exchanging block requests",
    "kv": "fetching keys and values",
    "kv_outer": "fetching keys and values from other nodes",
    "kv_hot": "broadcasting hot keys and values",
    "kv_again": "fetching keys and values again",
    "kv_again_outer": "fetching keys and values from other nodes again",
    "kv_again_hot": "broadcasting hot keys and values again",
    "kv_grad": "returning gradients of keys and values",
    "kv_grad_outer": "returning gradients of keys and values to other nodes",
    "kv_grad_hot": "reducing gradients of hot keys and values",
    "full_kv": "fetching keys and values of a full-attention layer",
    "full_kv_again": "fetching keys and values of a full-attention layer again",
    "full_kv_grad": "returning gradients of keys and values of a full-attention layer",
}
# Of these every rank expects the same number of bytes.
_SAME_SIZE = ("index_key", "request_shape", "request")


class ExchangeError(RuntimeError):
    """An exchange between context-parallel ranks broke; the text names layer, point and ranks."""


@dataclass(slots=True)
class Site:
    """Where a rank stands: layer (0: none), purpose of its last collective, whether it waits for it.

    num_bytes: that it expects in all.
    """

    layer: int = 0
    purpose: str = ""
    waits: bool = False
    num_bytes: int = 0

    def fits(self, other: "Site") -> bool:
        """Whether both ranks are at the same point and, where all must be alike, expect as many bytes."""
        if (self.layer, self.purpose) != (other.layer, other.purpose):
            return False
        return self.purpose not in _SAME_SIZE or self.num_bytes == other.num_bytes

    def __str__(self) -> str:
        if not self.purpose:
            return "before the first exchange"
        point = describe(self.layer, self.purpose)
        size = f", {self.num_bytes} bytes" if self.purpose in _SAME_SIZE else ""
        return f"{point}{size}" if self.waits else f"computing after {point}"


def describe(layer: int, purpose: str) -> str:
    """Example: 3, "kv" -> "layer 3, fetching keys and values (kv)"."""
    where = f"layer {layer}, " if layer else ""
    return f"{where}{_POINTS[purpose]} ({purpose})" if purpose in _POINTS else f"{where}{purpose}"


class FaultWatch:
    """One rank's part: remembers where it stands, answers when another rank failed, names the missing."""

    def __init__(self, store: Store, ranks: Sequence[int], rank: int) -> None:
        """store: of the job. ranks: of the job, those of the context-parallel group. rank: own, in it."""
        self.ranks, self.rank = list(ranks), rank
        self._store = PrefixStore(f"msa_train_faults_{'_'.join(map(str, ranks[:1]))}_{len(ranks)}", store)
        self._site, self._answered = Site(), False
        self._lock = threading.Lock()
        self._finalizer: weakref.finalize | None = None

    def start(self) -> None:
        """Begin to look for failures of other ranks."""
        stop = threading.Event()
        # The thread must not keep the watch alive.
        look = threading.Thread(
            target=_look, args=(weakref.ref(self), stop), name="exchange-faults", daemon=True
        )
        look.start()
        # Also at the end of the interpreter: a thread inside the store then would end it by a signal.
        self._finalizer = weakref.finalize(self, _end, stop, look)

    def close(self) -> None:
        """Stop looking."""
        if self._finalizer is not None:
            self._finalizer()

    def at(self, layer: int, purpose: str, num_bytes: int) -> None:
        """This rank starts a collective."""
        self._site = Site(layer, purpose, False, num_bytes)

    def waits(self, layer: int, purpose: str, num_bytes: int) -> None:
        """This rank waits for a collective."""
        self._site = Site(layer, purpose, True, num_bytes)

    def goes_on(self) -> None:
        """This rank has what it waited for."""
        self._site = replace(self._site, waits=False)

    def failure(self, layer: int, purpose: str, num_bytes: int, error: BaseException) -> ExchangeError:
        """The error to raise after a collective failed here; takes up to the grace."""
        self._site = Site(layer, purpose, True, num_bytes)
        reason = " ".join(str(error).split())
        here = f"{describe(layer, purpose)}: {self.name(self.rank)} lost the others ({reason[:200]})"
        try:
            sites = self._ask()
        except Exception as lost:
            why = " ".join(str(lost).split())[:100]
            return ExchangeError(f"{here}; the job's store is gone too, its host may be missing ({why})")
        missing = [rank for rank in range(len(self.ranks)) if rank not in sites]
        if missing:
            verb = "do not answer and are" if len(missing) > 1 else "does not answer and is"
            return ExchangeError(f"{here}; {self._names(missing)} {verb} dead or stalled")
        apart = {r: site for r, site in sites.items() if not site.fits(self._site)}
        found = "; ".join(f"{self.name(rank)} is at: {site}" for rank, site in sorted(apart.items()))
        return ExchangeError(f"{here}; all ranks answer; {found or 'all are at the same point'}")

    def name(self, rank: int) -> str:
        """Example: 2 -> "cp rank 2", with the rank of the job where that differs."""
        job = self.ranks[rank]
        return f"cp rank {rank}" if job == rank else f"cp rank {rank} (rank {job} of the job)"

    def _names(self, ranks: Sequence[int]) -> str:
        return ", ".join(self.name(rank) for rank in ranks)

    def _ask(self) -> dict[int, Site]:
        """Answers by rank; the first to fail decides for all who is missing."""
        with self._lock:
            self._answer()
            self._store.set("failed", "1")
        deadline = time.monotonic() + GRACE_S
        while True:
            with self._lock:
                missing = self._read("missing")
                sites = {rank: self._read(f"site_{rank}") for rank in range(len(self.ranks))}
            found = {rank: Site(**json.loads(text)) for rank, text in sites.items() if text is not None}
            if missing is not None:
                return {rank: site for rank, site in found.items() if rank not in json.loads(missing)}
            if len(found) == len(self.ranks):
                return found
            if time.monotonic() > deadline:
                absent = [rank for rank in range(len(self.ranks)) if rank not in found]
                with self._lock:
                    self._store.set("missing", json.dumps(absent))
                return found
            time.sleep(POLL_S / 5)

    def _read(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _answer(self) -> None:
        if not self._answered:
            self._store.set(f"site_{self.rank}", json.dumps(asdict(self._site)))
            self._answered = True

    def answer_if_asked(self) -> bool:
        """One look at the store; returns whether there is nothing more to look for."""
        with self._lock:
            if not self._store.check(["failed"]):
                return False
            self._answer()
            return True


def _look(watch: "weakref.ref[FaultWatch]", stop: threading.Event) -> None:
    while not stop.wait(POLL_S):
        alive = watch()
        try:
            if alive is None or alive.answer_if_asked():
                return
        except Exception:
            # The store ends with the process that hosts it: nobody is left to ask.
            return
        del alive


def _end(stop: threading.Event, look: threading.Thread) -> None:
    stop.set()
    if look is not threading.current_thread():
        look.join(timeout=2 * POLL_S)
