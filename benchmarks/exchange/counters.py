"""Read bytes and packets of a network interface from the kernel's counters of a network namespace."""

from dataclasses import dataclass
from pathlib import Path

# Of the calling thread's namespace; /sys/class/net shows those of the namespace in which it was mounted.
_COUNTERS = Path("/proc/thread-self/net/dev")
_PROTOCOLS = Path("/proc/thread-self/net/snmp")


@dataclass(slots=True, frozen=True)
class Counters:
    """Count what an interface has received and sent since it exists."""

    received_bytes: int
    "headers included"
    received_packets: int
    "as the kernel counts them: a large one may stand for many on the wire"
    sent_bytes: int
    "headers included"
    sent_packets: int
    "counted like received_packets"

    def __sub__(self, before: "Counters") -> "Counters":
        return Counters(
            self.received_bytes - before.received_bytes,
            self.received_packets - before.received_packets,
            self.sent_bytes - before.sent_bytes,
            self.sent_packets - before.sent_packets,
        )


def parse_counters(text: str, interface: str) -> Counters:
    """Read one interface's line of /proc/net/dev.

    Example: " eth0: 900 3 0 0 0 0 0 0 70 1 0 0 0 0 0 0" -> Counters(900, 3, 70, 1).

    Raises:
        ValueError: if the interface is not there.
    """
    for line in text.splitlines():
        name, colon, values = line.partition(":")
        if colon and name.strip() == interface:
            numbers = [int(x) for x in values.split()]
            return Counters(numbers[0], numbers[1], numbers[8], numbers[9])
    raise ValueError(f"interface={interface}: is not in {_COUNTERS}")


def read_retransmits() -> int:
    """Count the TCP segments that this process's network namespace has sent again."""
    names, values = [x.split() for x in _PROTOCOLS.read_text().splitlines() if x.startswith("Tcp:")]
    return int(values[names.index("RetransSegs")])


def read_counters(interface: str) -> Counters:
    """Read the counters of an interface of this process's network namespace."""
    return parse_counters(_COUNTERS.read_text(), interface)
