"""Let the nodes of a job talk about themselves before training, by plain sockets to the first of them.

Every other node connects, says what it is, answers pings of its clock and sends back what it gets. Only then
are all of them told whether to try a collective together. A node that is silent is known by its rank.

The port is open to everyone on the network. Who connects proves by the job's token, over a number drawn for
this connection, that it belongs to the job, and so does the first node to it; until then it gets one line of
limited length, a few seconds and one of a limited number of threads, and can keep nobody else waiting.

On N nodes the first one has N - 1 connections, N + 64 threads at most for greetings, and measures one link
after the other: 31 connections and at most 96 threads on 32 nodes. A node that hangs after it has proved
itself costs up to ANSWER_S of the time that all nodes share.

    node -> first       connects
    first -> node       challenge, 16 random bytes
    node -> first       signature of both, {"rank", "facts", "challenge": 16 random bytes of its own}
    first -> node       "time", three times; the node answers with its clock
    first -> node       "echo" and ECHO_BYTES; the node sends them back
    first -> node       "go on" or "leave", with a signature over the node's challenge
"""

import contextlib
import json
import math
import queue
import secrets
import socket
import statistics
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

from launchers.slurm.job_token import is_signed, sign
from launchers.slurm.node_facts import Facts, read_facts

# large enough that a link of 100 Mbit/s among those of 100 Gbit/s shows
ECHO_BYTES = 2**20
# for a stranger, or a node, to say who it is; for a node to answer a ping or send back ECHO_BYTES
GREETING_S, ANSWER_S = 5.0, 10.0
# Likewise for a node whose turn comes after the time of all: one that is well needs some milliseconds.
LATE_ANSWER_S = 1.0
_LINE_BYTES = 2**14
# connections at once that have not proved anything yet, besides one for each node
_STRANGERS = 64
# of which the quickest counts
_PINGS = 3


@dataclass(kw_only=True, slots=True)
class Answer:
    """Hold what the first node knows about another one, or about itself."""

    facts: Facts
    "as the node has sent them"
    clock_s: float
    "seconds by which its clock is ahead"
    echo_s: float
    "seconds for ECHO_BYTES there and back"


class Link:
    """Wrap a connection so that no wait is without an end and no line without a limit."""

    def __init__(self, connection: socket.socket, wait_s: float) -> None:
        """Take over a connection.

        Args:
            connection: open.
            wait_s: seconds for all of the next line or bytes, not for each piece of it: a stranger who sends
                a byte now and then would otherwise hold a thread for ever. May be set anew.
        """
        self._socket, self.wait_s, self._rest = connection, wait_s, b""

    def send(self, data: bytes) -> None:
        """Send all of it.

        Raises:
            OSError: if the other side does not take it in time or has left.
        """
        self._socket.settimeout(self.wait_s)
        self._socket.sendall(data)

    def read_line(self) -> bytes:
        """Return the next line without its end, empty if the other side has left.

        Raises:
            OSError: if it is too long or does not come in time.
        """
        deadline = time.monotonic() + self.wait_s
        while b"\n" not in self._rest:
            if len(self._rest) > _LINE_BYTES:
                raise ConnectionError("a line is too long")
            if not (data := self._receive(deadline)):
                return b""
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def read(self, num_bytes: int) -> bytes:
        """Return the next bytes.

        Args:
            num_bytes: exactly as many.

        Raises:
            OSError: if they do not come in time.
        """
        deadline, parts, missing = time.monotonic() + self.wait_s, [self._rest], num_bytes - len(self._rest)
        while missing > 0:
            if not (data := self._receive(deadline)):
                raise ConnectionError("it has left")
            parts.append(data)
            missing -= len(data)
        found = b"".join(parts)
        self._rest = found[num_bytes:]
        return found[:num_bytes]

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def _receive(self, deadline: float) -> bytes:
        """Receive some bytes before the deadline, none if the other side has left."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer in time")
        self._socket.settimeout(left)
        return self._socket.recv(2**16)


@dataclass(kw_only=True, slots=True)
class _Guest:
    """Hold a node that has proved to be one."""

    link: Link
    "to the node, open until the last word"
    rank: int
    "from 1; rank 0 is the first node itself"
    facts: Facts
    "as the node has sent them"
    challenge: bytes
    "drawn by the node, so that it knows the first node's last word from a stranger's"


class Head:
    """Play the first node's part: listen, tell nodes from strangers, measure, tell all how to go on.

    One thread accepts, one for each newcomer listens to its greeting, the caller's measures the links: so a
    stranger who says nothing keeps no node from being heard.
    """

    def __init__(self, port: int, num_nodes: int, token: bytes) -> None:
        """Begin to listen.

        Args:
            port: on all addresses, as nodes come by whichever network resolves the name.
            num_nodes: of the job, this one included.
            token: see job_token.

        Raises:
            OSError: if the port is taken.
        """
        self._server = socket.create_server(("", port), backlog=num_nodes + _STRANGERS)
        self._guests: dict[int, _Guest] = {}
        self._proved: queue.SimpleQueue[_Guest] = queue.SimpleQueue()
        self._places = threading.BoundedSemaphore(num_nodes + _STRANGERS)
        self.num_nodes, self._token = num_nodes, token
        threading.Thread(target=self._accept, name="preflight-accept", daemon=True).start()

    def ask_all(self, timeout_s: float) -> dict[int, Answer]:
        """Measure all nodes that come in time.

        One after the other, as they share the first node's link: at once they would slow each other down. So
        nodes that prove themselves and then hang use up the time of those behind them, ANSWER_S each: whoever
        has proved itself by the end is measured after it, within LATE_ANSWER_S, and not called silent.

        Args:
            timeout_s: seconds in which nodes must have come; LATE_ANSWER_S per node more at the most.

        Returns:
            Answers by rank, without those that are silent.
        """
        deadline, answers = time.monotonic() + timeout_s, {}
        end = deadline + LATE_ANSWER_S * self.num_nodes
        while len(answers) < self.num_nodes - 1 and time.monotonic() < end:
            left = deadline - time.monotonic()
            try:
                guest = self._proved.get(timeout=left) if left > 0 else self._proved.get_nowait()
            except queue.Empty:
                break
            # the same node once more, e.g. after it gave up waiting: its first connection counts
            if guest.rank in answers:
                guest.link.close()
                continue
            guest.link.wait_s = min(ANSWER_S, max(left, LATE_ANSWER_S))
            try:
                clock_s, echo_s = _measure(guest.link)
            except (OSError, ValueError):
                guest.link.close()
                continue
            self._guests[guest.rank] = guest
            answers[guest.rank] = Answer(facts=guest.facts, clock_s=clock_s, echo_s=echo_s)
        return answers

    def tell_all(self, *, go_on: bool) -> None:
        """Tell the nodes whether to try a collective together, and stop listening.

        A node that has left keeps nobody. The word is signed over the node's own challenge, so that nobody
        can repeat that of another start.
        """
        word = "go on" if go_on else "leave"
        for guest in self._guests.values():
            signature = sign(self._token, b"word", guest.challenge, word.encode())
            with contextlib.suppress(OSError):
                guest.link.send(f"{word} {signature}\n".encode())
            guest.link.close()
        self.close()

    def close(self) -> None:
        """Listen no longer."""
        # a thread inside accept() keeps the port otherwise
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _accept(self) -> None:
        """Give each newcomer a thread, until the socket is closed."""
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            if not self._places.acquire(blocking=False):
                # a node tries again
                connection.close()
                continue
            threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        """Hear one newcomer, within GREETING_S per line, and queue it if it is a node."""
        link = Link(connection, GREETING_S)
        try:
            guest = self._hear(link)
        except (OSError, ValueError, RecursionError):
            guest = None
        finally:
            # a place is for proving oneself alone: nodes that wait to be measured must not use them up
            self._places.release()
        if guest is None:
            link.close()
        else:
            self._proved.put(guest)

    def _hear(self, link: Link) -> _Guest | None:
        """Challenge a newcomer; None if its signature is wrong. JSON is parsed only after it is right."""
        challenge = secrets.token_hex(16).encode()
        link.send(challenge + b"\n")
        signature, _, hello = link.read_line().partition(b" ")
        if not is_signed(signature.decode("ascii", "replace"), self._token, b"hello", challenge, hello):
            return None
        content = json.loads(hello)
        if not isinstance(content, dict) or set(content) != {"rank", "facts", "challenge"}:
            raise ValueError("must be rank, facts and challenge")
        rank, facts = content["rank"], read_facts(content["facts"])
        if type(rank) is not int or not 0 < rank < self.num_nodes:
            raise ValueError(f"rank={rank}: is none of {self.num_nodes} nodes")
        return _Guest(link=link, rank=rank, facts=facts, challenge=str(content["challenge"]).encode())


def answer_head(head: str, port: int, rank: int, facts: Facts, token: bytes, timeout_s: float) -> bool:
    """Play the part of the other nodes; returns whether to go on.

    Args:
        head: host name of the first node.
        port: of the first node.
        rank: of this node, from 1.
        facts: of this node.
        token: see job_token.
        timeout_s: seconds to reach the first node; its last word may take twice as long.

    Raises:
        OSError: if the first node cannot be reached, is silent, or does not know the token.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            link, challenge = _connect(head, port, rank, facts, token, deadline, timeout_s)
            word, _, signature = _serve(link).rpartition(b" ")
            break
        except OSError:
            # it may not have started yet, or had no place free for one more that it does not know yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    link.close()
    if not is_signed(signature.decode("ascii", "replace"), token, b"word", challenge, word):
        raise ConnectionError(f"what listens at {head}:{port} does not belong to this job")
    return word == b"go on"


def slow_nodes(echo_s: dict[str, float], factor: float) -> list[str]:
    """List the nodes whose link is `factor` times slower than the median; none of fewer than 3 nodes.

    The median, as one bad node must not move what the others are held to.

    Args:
        echo_s: seconds by node.
        factor: above 1.

    Example: {"a": 0.01, "b": 0.01, "c": 0.2}, 4 -> ["c"].
    """
    if len(echo_s) < 3:
        return []
    # below a millisecond it is the noise of the machine
    limit = factor * max(statistics.median(echo_s.values()), 1e-3)
    return [node for node, seconds in echo_s.items() if seconds > limit]


def _measure(link: Link) -> tuple[float, float]:
    """Measure by how many seconds the node's clock is ahead, and those for ECHO_BYTES there and back.

    Example: sent at 10.000, answered 12.001, back at 10.004 -> the answer was made at about 10.002 of this
    clock, so the node is 1.999 s ahead. The error is at most half the time of the ping.
    """
    offsets: list[tuple[float, float]] = []
    for _ in range(_PINGS):
        sent = time.time()
        link.send(b"time\n")
        there = float(link.read_line())
        back = time.time()
        if not math.isfinite(there):
            raise ValueError("its clock shows no number")
        offsets.append((back - sent, there - (sent + back) / 2))
    start = time.perf_counter()
    link.send(b"echo\n" + bytes(ECHO_BYTES))
    link.read(ECHO_BYTES)
    # the quickest ping tells the clock best
    return min(offsets)[1], time.perf_counter() - start


def _connect(
    head: str, port: int, rank: int, facts: Facts, token: bytes, deadline: float, timeout_s: float
) -> tuple[Link, bytes]:
    """Connect to the first node and prove to belong to the job; returns link and own challenge."""
    left = max(deadline - time.monotonic(), 0.1)
    link = Link(socket.create_connection((head, port), timeout=left), left)
    challenge = link.read_line()
    if not challenge:
        link.close()
        raise ConnectionError("the first node has left")
    own = secrets.token_hex(16)
    content: dict[str, Any] = {"rank": rank, "facts": asdict(facts), "challenge": own}
    hello = json.dumps(content).encode()
    link.send(sign(token, b"hello", challenge, hello).encode() + b" " + hello + b"\n")
    # the first node asks one after the other and judges when it has heard all
    link.wait_s = 2 * timeout_s
    return link, own.encode()


def _serve(link: Link) -> bytes:
    """Answer until the last word, which is returned with its signature."""
    while True:
        line = link.read_line()
        if line == b"time":
            link.send(f"{time.time()}\n".encode())
        elif line == b"echo":
            link.send(link.read(ECHO_BYTES))
        elif line:
            return line
        else:
            raise ConnectionError("the first node has left")
