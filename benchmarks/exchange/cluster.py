"""Start ranks, join them by links, send them requests; end them whatever happens."""

import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any

from benchmarks.exchange import namespaces
from benchmarks.exchange.counters import read_counters
from benchmarks.exchange.rank import RankFailure, RankPlace, run_rank

# Answers of ranks that lost a peer are waited for, since the first cause tells more than what follows.
_GRACE_S = 2.0


class RankError(RuntimeError):
    """Report that a rank raised or ended; the text holds its traceback."""


class Cluster:
    """Run the ranks of one benchmark part; use as a context manager."""

    def __init__(self, size: int, *, num_nodes: int, shaped: bool, timeout_s: float) -> None:
        """Take what is to be started; entering the context starts it.

        Args:
            size: ranks.
            num_nodes: 1 or 2.
            shaped: namespaces and links, else loopback.
            timeout_s: seconds for any request.
        """
        self.size, self.num_nodes, self.shaped, self.timeout_s = size, num_nodes, shaped, timeout_s
        self._folder = tempfile.TemporaryDirectory(prefix="exchange_")
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> "Cluster":
        # Forked: torch is imported once, by this process, which runs none of it.
        context = multiprocessing.get_context("fork")
        for rank in range(self.size):
            place = RankPlace(rank, self.size, self.num_nodes, self.shaped, self._folder.name, self.timeout_s)
            ours, theirs = context.Pipe()
            process = context.Process(target=run_rank, args=(place, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        try:
            if self.shaped:
                namespaces.join_ranks(self._answers("namespace"), self.num_nodes)
                for pipe in self._pipes:
                    pipe.send(None)
            self._answers("start")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, name: str, *arguments: Any) -> list[Any]:
        """Call a method of RankWorker on every rank; answers by rank.

        Raises:
            RankError: with the traceback of the rank that failed first.
            TimeoutError: if a rank did not answer within timeout_s.
        """
        for pipe in self._pipes:
            pipe.send((name, arguments))
        return self._answers(name)

    def limit(self, rates: namespaces.Rates) -> None:
        """Set the rates of all links."""
        if self.shaped:
            namespaces.limit_hub(self.size, self.num_nodes, rates)
            self.call("limit_link", rates)

    def between_nodes(self) -> int:
        """Count the bytes that have passed between the nodes so far, both ways together."""
        ends = [f"{namespaces.NODE_LINK}{node}" for node in range(2)] if self._linked else []
        return sum(read_counters(end).received_bytes for end in ends)

    @property
    def _linked(self) -> bool:
        return self.shaped and self.num_nodes == 2

    def close(self) -> None:
        """Kill the ranks; their namespaces and links go with them, the bridges follow."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        if self.shaped:
            namespaces.remove_hub()
        self._folder.cleanup()

    def _answers(self, name: str) -> list[Any]:
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + self.timeout_s
        while len(answers) + len(failures) < self.size:
            left = deadline - time.monotonic()
            waiting = {self._pipes[r]: r for r in range(self.size) if r not in answers and r not in failures}
            ready = wait(list(waiting), timeout=max(0.0, left)) if left > 0 else []
            if not ready:
                break
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                try:
                    answer = self._pipes[rank].recv()
                except (EOFError, ConnectionResetError):
                    answer = RankFailure("ended without a word")
                if isinstance(answer, RankFailure):
                    # its peers hang in a collective: they get _GRACE_S, not what is left of the time
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
                    failures[rank] = answer.text
                else:
                    answers[rank] = answer
        if failures:
            rank, text = next(iter(failures.items()))
            raise RankError(f"{name}: rank {rank} of {self.size} failed first: {text}")
        if len(answers) < self.size:
            missing = sorted(set(range(self.size)) - set(answers))
            raise TimeoutError(f"{name}: ranks {missing} did not answer within {self.timeout_s:.0f} s")
        return [answers[rank] for rank in range(self.size)]
