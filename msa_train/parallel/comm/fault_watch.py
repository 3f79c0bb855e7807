"""Find out who is missing, one rank's part of it; see `rank_faults`."""

import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from msa_train.parallel.comm.rank_faults import (
    BEAT_S,
    ENDED,
    GRACE_S,
    POLL_S,
    ExchangeError,
    RankStatus,
    describe,
    has_lost_others,
    is_out_of_memory,
    reason_of,
)

# Of the process, which is in one job: for collectives that know no `CpComm`.
_current: "FaultWatch | None" = None


@dataclass(slots=True)
class Verdict:
    """Hold what an enquiry has found."""

    sites: dict[int, RankStatus] = field(default_factory=dict[int, RankStatus])
    "where the ranks stand that answered, by rank"
    missing: list[int] = field(default_factory=list[int])
    "ranks that did not answer"

    def to_json(self) -> str:
        """Write it for the store."""
        sites = {rank: asdict(site) for rank, site in self.sites.items()}
        return json.dumps({"sites": sites, "missing": self.missing})

    @staticmethod
    def from_json(text: str) -> "Verdict":
        """Read what `to_json` wrote."""
        read = json.loads(text)
        sites = {int(rank): RankStatus(**site) for rank, site in read["sites"].items()}
        return Verdict(sites, read["missing"])


class FaultWatch:
    """Remember where this rank stands, answer when another rank failed, name the missing."""

    def __init__(
        self,
        store: Store,
        ranks: Sequence[int],
        rank: int,
        *,
        timeout_s: float = 0.0,
        give_up: Callable[[ExchangeError], None] | None = None,
    ) -> None:
        """Watch a group of ranks, best all of the job.

        Args:
            store: of the job.
            ranks: of the job, those of the group.
            rank: own, in the group.
            timeout_s: longest silence of a rank, in seconds; 0: any.
            give_up: called by a thread when a rank is lost, to end this process wherever it stands. None:
                only this rank's own collectives raise.
        """
        self.ranks, self.rank, self.timeout_s, self.give_up = list(ranks), rank, timeout_s, give_up
        self._store = PrefixStore(f"msa_train_faults_{'_'.join(map(str, ranks[:1]))}_{len(ranks)}", store)
        self._site, self._answered = RankStatus(), False
        self._lock = threading.Lock()
        self._finalizer: weakref.finalize | None = None
        # Twenty signs of life within the limit, but no more often than the store is looked at.
        self._beat_s = min(max(timeout_s / 20, POLL_S), BEAT_S)
        self._next_beat_s = 0.0
        self._heard, self.silent_s, self.unanswered_s = -1, 0.0, 0.0

    def start(self) -> None:
        """Begin to look for failures of other ranks."""
        stop, myself = threading.Event(), weakref.ref(self)
        # The threads must not keep the watch alive.
        threads = [threading.Thread(target=_look, args=(myself, stop), name="faults", daemon=True)]
        if self.give_up is not None and self.timeout_s > 0:
            # Where the process that keeps the store is stopped, whoever asks it waits for ever.
            threads.append(
                threading.Thread(target=_time, args=(myself, stop), name="faults-clock", daemon=True)
            )
        for thread in threads:
            thread.start()
        # Also at the end of the interpreter: a thread inside the store then would end it by a signal.
        self._finalizer = weakref.finalize(self, _end, stop, threads)

    def make_current(self) -> None:
        """Let collectives that know no `CpComm` report here from now on."""
        global _current
        _current = self

    def close(self) -> None:
        """Stop looking; the others are told that this rank has come to its end."""
        global _current
        if _current is self:
            _current = None
        if self._finalizer is None or not self._finalizer.alive:
            return
        self._finalizer()
        try:
            with self._lock:
                self._store.add(f"beat_{self.rank}", ENDED)
        except Exception:
            # its host has come to its end before
            return

    def entered(self, layer: int, purpose: str, num_bytes: int) -> None:
        """Note that this rank starts a collective."""
        self._site = RankStatus(layer, purpose, False, num_bytes)

    def waiting(self, layer: int, purpose: str, num_bytes: int) -> None:
        """Note that this rank waits for a collective."""
        self._site = RankStatus(layer, purpose, True, num_bytes)

    def done(self) -> None:
        """Note that this rank has what it waited for."""
        self._site = replace(self._site, waits=False)

    def failure(self, layer: int, purpose: str, num_bytes: int, error: RuntimeError) -> RuntimeError:
        """Make the error to raise after a collective failed here; takes up to the grace."""
        if is_out_of_memory(error):
            return error
        self._site = RankStatus(layer, purpose, True, num_bytes)
        return self._explain(reason_of(error), set())

    def ending(self, error: Exception) -> Exception:
        """Make the error that this rank ends with: names who was lost, or tells the others of its own."""
        if isinstance(error, RuntimeError) and has_lost_others(error):
            site = self._site
            return self.failure(site.layer, site.purpose, site.num_bytes, error)
        if not isinstance(error, ExchangeError):
            self.tell(error)
        return error

    def tell(self, error: BaseException) -> None:
        """Tell the others that this rank ends by an error of its own; they say so when they miss it."""
        words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if self._lock.acquire(timeout=POLL_S):
            try:
                self._site = replace(self._site, words=words)
                self._answer()
            except Exception:
                # the store is gone: nobody is left to be told
                return
            finally:
                self._lock.release()

    def _explain(self, reason: str, silent: set[int]) -> ExchangeError:
        """Ask all ranks and make the error to raise; silent: ranks known to be stalled."""
        site, here = self._site, self._here()
        lost = f"{self.name(self.rank)} lost the others ({reason[:200]})"
        try:
            verdict = self._ask(silent)
        except Exception as error:
            why = reason_of(error)[:100]
            return ExchangeError(
                f"{here}: {lost}; the job's store is gone too, its host may be missing ({why})"
            )
        ended = {rank: found.words for rank, found in sorted(verdict.sites.items()) if found.words}
        if ended:
            told = "; ".join(f"{self.name(rank)} has failed ({words})" for rank, words in ended.items())
            return ExchangeError(f"{here}: {told}; {lost}")
        if verdict.missing:
            verb = "do not answer and are" if len(verdict.missing) > 1 else "does not answer and is"
            names = ", ".join(map(self.name, verdict.missing))
            return ExchangeError(f"{here}: {names} {verb} dead or stalled; {lost}")
        apart = {rank: other for rank, other in verdict.sites.items() if not other.fits(site)}
        found = "; ".join(f"{self.name(rank)} is at: {other}" for rank, other in sorted(apart.items()))
        return ExchangeError(f"{here}: {lost}; all ranks answer; {found or 'all are at the same point'}")

    def _here(self) -> str:
        site = self._site
        return describe(site.layer, site.purpose) if site.waits else str(site)

    @property
    def standing(self) -> RankStatus:
        """Tell where this rank stands now."""
        return self._site

    def name(self, rank: int) -> str:
        """Name a rank of the group by its rank in the job: 2 -> "rank 2"."""
        return f"rank {self.ranks[rank]}"

    def _ask(self, silent: set[int]) -> Verdict:
        """Ask who is missing. The first to ask decides for all; a second one does where it says nothing."""
        with self._lock:
            self._answer()
            # The store's counter gives each asker another number; later ones wait longer, in case the first
            # is lost before it gives its verdict.
            turn = self._store.add("asked", 1)
            self._store.set("failed", "1")
        deadline = time.monotonic() + GRACE_S * turn
        if self.silent_s > GRACE_S:
            silent = silent | {(self.rank + 1) % len(self.ranks)}
        while time.monotonic() < deadline:
            self.unanswered_s = 0.0
            with self._lock:
                if self._store.check(["verdict"]):
                    break
                if turn == 1 and self._store.add("answers", 0) >= len(self.ranks) - len(silent):
                    break
            time.sleep(POLL_S / 5)
        with self._lock:
            if not self._store.check(["verdict"]):
                self._store.set("verdict", self._count().to_json())
            return Verdict.from_json(self._store.get("verdict").decode())

    def _count(self) -> Verdict:
        verdict = Verdict()
        for rank in range(len(self.ranks)):
            if self._store.check([f"site_{rank}"]):
                verdict.sites[rank] = RankStatus(**json.loads(self._store.get(f"site_{rank}")))
            else:
                verdict.missing.append(rank)
        return verdict

    def _answer(self) -> None:
        if not self._answered:
            self._answered = True
            self._store.set(f"site_{self.rank}", json.dumps(asdict(self._site)))
            self._store.add("answers", 1)

    def look(self, passed_s: float) -> bool:
        """Look at the store once; return whether there is nothing more to look for.

        Args:
            passed_s: since the last look, in seconds.
        """
        with self._lock:
            failed = self._store.check(["failed"])
            if failed:
                self._answer()
            silent = set() if failed or self.timeout_s <= 0 else self._listen(passed_s)
        self.unanswered_s = 0.0
        # Outside the lock, for explaining asks the store again.
        if (failed or silent) and self.give_up is not None:
            if failed:
                reason = "another rank found it"
            else:
                reason = f"no sign of life for {self.timeout_s:g} s, launcher.timeout_s"
            self.give_up(self._explain(reason, silent))
        return failed or bool(silent)

    def _listen(self, passed_s: float) -> set[int]:
        """Give a sign of life where it is due; return the next rank, if it has given none for long."""
        self._next_beat_s -= passed_s
        if self._next_beat_s <= 0:
            self._next_beat_s = self._beat_s
            self._store.add(f"beat_{self.rank}", 1)
        following = (self.rank + 1) % len(self.ranks)
        key = f"beat_{following}"
        heard = int(self._store.get(key)) if self._heard > 0 or self._store.check([key]) else 0
        self.silent_s = 0.0 if heard != self._heard or heard >= ENDED else self.silent_s + passed_s
        self._heard = heard
        return {following} if self.silent_s > self.timeout_s + self._beat_s else set()

    def tick(self, passed_s: float) -> None:
        """Count the time that passes; give up where the store has not answered for too long."""
        self.unanswered_s += passed_s
        if self.unanswered_s > self.timeout_s and self.give_up is not None:
            self.give_up(
                ExchangeError(
                    f"{self._here()}: {self.name(self.rank)} has had no answer from the job's store for "
                    f"{self.timeout_s:g} s, launcher.timeout_s; its host, the launcher or rank 0, is stalled"
                )
            )


def tell_others(error: BaseException) -> None:
    """The other ranks, when they miss this one, say that it ended by this error."""
    if _current is not None:
        _current.tell(error)


def own_standing() -> tuple[str, bool]:
    """Tell where this rank stands, and whether it only waits for others there; empty without a watch.

    Example: ("waiting for other ranks with gathering metrics (metrics)", True).
    """
    site = RankStatus() if _current is None else _current.standing
    if not site.purpose:
        return "", False
    return f"waiting for other ranks with {site}" if site.waits else str(site), site.waits


@contextmanager
def watched(purpose: str, layer: int = 0) -> Iterator[None]:
    """Let collectives name their point when they fail, and be found there when another rank asks.

    Raises:
        ExchangeError: in place of what a collective raised that lost another rank.
    """
    watch = _current
    if watch is None or threading.current_thread() is not threading.main_thread():
        # What is saved beside the training says nothing about where the rank stands.
        yield
        return
    watch.waiting(layer, purpose, 0)
    try:
        yield
    except ExchangeError:
        raise
    except RuntimeError as error:
        if not has_lost_others(error):
            raise
        raise watch.failure(layer, purpose, 0, error) from error
    watch.done()


def _passed(since_s: float) -> tuple[float, float]:
    """Give now and the seconds since then; few where this process stood still, which accuses nobody."""
    now_s = time.monotonic()
    return now_s, min(now_s - since_s, 4 * POLL_S)


def _look(watch: "weakref.ref[FaultWatch]", stop: threading.Event) -> None:
    last_s = time.monotonic()
    while not stop.wait(POLL_S):
        alive = watch()
        last_s, passed_s = _passed(last_s)
        try:
            if alive is None or alive.look(passed_s):
                return
        except Exception:
            # The store ends with the process that hosts it: nobody is left to ask.
            return
        del alive


def _time(watch: "weakref.ref[FaultWatch]", stop: threading.Event) -> None:
    last_s = time.monotonic()
    while not stop.wait(POLL_S):
        alive = watch()
        if alive is None:
            return
        last_s, passed_s = _passed(last_s)
        alive.tick(passed_s)
        del alive


def _end(stop: threading.Event, threads: Sequence[threading.Thread]) -> None:
    stop.set()
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(timeout=2 * POLL_S)
