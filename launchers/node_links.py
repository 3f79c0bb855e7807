"""How the nodes of a job talk about themselves before training: plain sockets to the first of them.

Every other node connects, says what it is, answers pings of its clock and sends back what it gets. Only then
are all of them told whether to try a collective together. A node that is silent is known by its rank.
"""

import json
import socket
import statistics
import time
from dataclasses import asdict, dataclass

from launchers.node_facts import Facts

ECHO_BYTES = 2**20
_PINGS = 3


@dataclass(kw_only=True, slots=True)
class Answer:
    """What the first node knows about another one, or about itself."""

    facts: Facts
    clock_s: float
    "how far its clock is ahead"
    echo_s: float
    "for ECHO_BYTES there and back"


class Head:
    """Rank 0's part."""

    def __init__(self, port: int, num_nodes: int) -> None:
        self._server = socket.create_server(("", port), backlog=num_nodes)
        self._links: dict[int, socket.socket] = {}
        self.num_nodes = num_nodes

    def ask_all(self, timeout_s: float) -> dict[int, Answer]:
        """Answers by rank, without those that are silent."""
        deadline, answers = time.monotonic() + timeout_s, {}
        while len(answers) < self.num_nodes - 1 and (left := deadline - time.monotonic()) > 0:
            self._server.settimeout(left)
            try:
                link, _ = self._server.accept()
            except TimeoutError:
                break
            link.settimeout(timeout_s)
            try:
                rank, answer = _ask(link)
            except (OSError, ValueError):
                link.close()
                continue
            self._links[rank], answers[rank] = link, answer
        return answers

    def tell_all(self, *, go_on: bool) -> None:
        """Whether the nodes shall try a collective together."""
        for link in self._links.values():
            with link:
                link.sendall(b"go on\n" if go_on else b"leave\n")
        self._server.close()


def answer_head(head: str, port: int, rank: int, facts: Facts, timeout_s: float) -> bool:
    """The part of the other nodes; returns whether to go on.

    Raises:
        OSError: if the first node cannot be reached or is silent.
    """
    with _connect(head, port, timeout_s) as link, link.makefile("rwb") as stream:
        stream.write(json.dumps({"rank": rank, "facts": asdict(facts)}).encode() + b"\n")
        stream.flush()
        while True:
            word = stream.readline().strip()
            if word == b"time":
                stream.write(f"{time.time()}\n".encode())
            elif word == b"echo":
                stream.write(stream.read(ECHO_BYTES))
            elif word:
                return word == b"go on"
            else:
                raise ConnectionError("the first node has left")
            stream.flush()


def slow_nodes(echo_s: dict[str, float], factor: float) -> list[str]:
    """Nodes whose link is `factor` times slower than the median; among fewer than 3, none can be told.

    Example: {"a": 0.01, "b": 0.01, "c": 0.2}, 4 -> ["c"].
    """
    if len(echo_s) < 3:
        return []
    # below a millisecond it is the noise of the machine
    limit = factor * max(statistics.median(echo_s.values()), 1e-3)
    return [node for node, seconds in echo_s.items() if seconds > limit]


def _ask(link: socket.socket) -> tuple[int, Answer]:
    with link.makefile("rwb") as stream:
        hello = json.loads(stream.readline())
        offsets: list[tuple[float, float]] = []
        for _ in range(_PINGS):
            sent = time.time()
            stream.write(b"time\n")
            stream.flush()
            there = float(stream.readline())
            back = time.time()
            offsets.append((back - sent, there - (sent + back) / 2))
        start = time.perf_counter()
        stream.write(b"echo\n" + bytes(ECHO_BYTES))
        stream.flush()
        if len(stream.read(ECHO_BYTES)) < ECHO_BYTES:
            raise ConnectionError("it has left")
        seconds = time.perf_counter() - start
        # the quickest ping tells the clock best
        answer = Answer(facts=Facts(**hello["facts"]), clock_s=min(offsets)[1], echo_s=seconds)
        return int(hello["rank"]), answer


def _connect(head: str, port: int, timeout_s: float) -> socket.socket:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            link = socket.create_connection((head, port), timeout=timeout_s)
            link.settimeout(2 * timeout_s)
            return link
        except OSError:
            # it may not have started yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
