"""Make network namespaces for ranks, joined by links of a chosen rate.

Needs Linux and root, or user namespaces.

The calling process moves into a namespace of its own, which holds the bridges: the machine's network is not
touched. Every rank makes a namespace for itself; the caller hands it one end of a veth pair. No namespace has
a name, so all of them and their links vanish with the processes, however these end.

    rank 0 [eth0 10.77.0.1]---veth---+                    +---veth---[eth0 10.77.0.5] rank 4
    rank 1 [eth0 10.77.0.2]---veth---+ bridge 0 --- bridge 1 ...        (one bridge per node)
    both ends of every link are shaped by tc's token bucket
"""

import ctypes
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

INTERFACE = "eth0"
NODE_LINK = "node"
"names of the ends of the link between nodes: node0, node1"
_NEWUSER, _NEWNET, _PDEATHSIG = 0x10000000, 0x40000000, 1
# A bucket smaller than the largest packet that the stack hands down (64 KiB and headers) would cut it up.
_BURST_BYTES = 80_000
# Queue of a shaped end, as time at its rate.
_QUEUE_MS = 50
_MTU = 9000


@dataclass(slots=True, frozen=True)
class Rates:
    """Hold the rates of links in Mbit/s; 0: not limited."""

    rank: int
    "of each rank's link, in and out"
    nodes: int = 0
    "between two nodes, each way"


class NoNamespacesError(ValueError):
    """Report that namespaces are not to be had here; the text says why."""


def enter_own_network() -> None:
    """Move this process into a new, empty network namespace.

    Raises:
        NoNamespacesError: one line, if a program or a permission is missing.
    """
    missing = [name for name in ("ip", "tc") if _program(name) is None]
    if missing:
        raise NoNamespacesError(
            f"{' and '.join(missing)} (iproute2) not found; install it, or use --unshaped"
        )
    if os.geteuid() == 0:
        _unshare(_NEWNET)
        return
    uid, gid = os.geteuid(), os.getegid()
    _unshare(_NEWUSER | _NEWNET)
    # without it the kernel lets no user without privileges write gid_map
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def enter_rank_network() -> None:
    """Move a rank into its own namespace; the links come later, from the process that started it."""
    _unshare(_NEWNET)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the one that started it ends."""
    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)


def address(rank: int) -> str:
    """Return the address of a rank's interface: 0 -> 10.77.0.1."""
    return f"10.77.0.{rank + 1}"


def join_ranks(pids: list[int], num_nodes: int) -> None:
    """Make bridges and links for ranks that wait in their namespaces; consecutive ranks share a bridge.

    Example: 8 ranks, 2 nodes -> ranks 0 to 3 at bridge0, 4 to 7 at bridge1.
    """
    for node in range(num_nodes):
        _run(f"ip link add bridge{node} mtu {_MTU} type bridge")
        _run(f"ip link set bridge{node} up")
    if num_nodes == 2:
        _run(f"ip link add {NODE_LINK}0 mtu {_MTU} type veth peer name {NODE_LINK}1 mtu {_MTU}")
        for node in range(2):
            _run(f"ip link set {NODE_LINK}{node} master bridge{node} up")
    for rank, pid in enumerate(pids):
        end = f"rank{rank}"
        _run(f"ip link add {end} mtu {_MTU} type veth peer name {INTERFACE} mtu {_MTU} netns {pid}")
        _run(f"ip link set {end} master bridge{rank * num_nodes // len(pids)} up")


def remove_hub() -> None:
    """Take bridges and the link between nodes away; links to ranks vanish with the ranks."""
    for line in _run("ip -o link show").splitlines():
        name = line.split(":")[1].strip().partition("@")[0]
        if name.startswith(("bridge", "rank", f"{NODE_LINK}0")):
            # A rank's link may vanish by itself between the list and the removal.
            subprocess.run([_program("ip") or "ip", "link", "del", name], capture_output=True, timeout=20)


def set_up_rank(rank: int) -> None:
    """Set address, loopback and congestion control; called by a rank after join_ranks."""
    _run("ip link set lo up")
    _run(f"ip addr add {address(rank)}/24 dev {INTERFACE}")
    _run(f"ip link set {INTERFACE} up")
    folder = Path("/proc/sys/net/ipv4")
    allowed = (folder / "tcp_allowed_congestion_control").read_text().split()
    # bbr, the default of some machines, would pace by its own estimate of the rate that the bucket sets.
    for plain in ("cubic", "reno"):
        if plain in allowed:
            (folder / "tcp_congestion_control").write_text(plain)
            break


def limit_rank(rates: Rates) -> None:
    """Limit what a rank sends; called by the rank."""
    _limit(INTERFACE, rates.rank)


def limit_hub(num_ranks: int, num_nodes: int, rates: Rates) -> None:
    """Limit what ranks receive, and the link between nodes both ways."""
    for rank in range(num_ranks):
        _limit(f"rank{rank}", rates.rank)
    if num_nodes == 2:
        for node in range(2):
            _limit(f"{NODE_LINK}{node}", rates.nodes)


def _limit(interface: str, rate_mbit: int) -> None:
    """Replace the interface's queue; 0: take the limit away."""
    if rate_mbit == 0:
        shown = _run(f"tc qdisc show dev {interface}")
        if " tbf " in shown:
            _run(f"tc qdisc del dev {interface} root")
        return
    bucket = f"rate {rate_mbit}mbit burst {_BURST_BYTES} latency {_QUEUE_MS}ms"
    _run(f"tc qdisc replace dev {interface} root tbf {bucket}")


def _unshare(flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags) != 0:
        reason = os.strerror(ctypes.get_errno())
        raise NoNamespacesError(
            f"no network namespace can be made here ({reason}); run as root, or use --unshaped over loopback"
        )


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _run(command: str) -> str:
    name, *arguments = command.split()
    done = subprocess.run([_program(name) or name, *arguments], capture_output=True, text=True, timeout=20)
    if done.returncode != 0:
        raise NoNamespacesError(
            f"`{command}` failed: {' '.join(done.stderr.split())}; use --unshaped over loopback"
        )
    return done.stdout
