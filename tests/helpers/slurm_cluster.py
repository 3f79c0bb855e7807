"""A real Slurm cluster of several hosts on one machine, for tests. Needs Linux, root and Slurm's programs.

Every host has namespaces of its own: host name, address, /dev/shm, processes. None has a way out, and the
machine's own network is left as it is.

    commands --nsenter--> [control: munged, slurmctld, bridge]---veth---[node1: slurmd]
                                                           \\----veth---[node2: slurmd] ...

A host's first process holds its process namespace, so killing it is a power cut. All hosts vanish with the
process that made them, however that ends.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.slurm_settings import CONTROL, FREEZER, Shape, address, write_settings

UP_WITHIN_S = 60
POLL_S = 0.05
ASKED_AGAIN = 20
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
PR_SET_PDEATHSIG = 1

# First process of a host: waits for its cable, runs what it is for, collects orphans.
_HOST = """
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
ip link set lo up
until ip -o link show eth0 up 2>/dev/null | grep -q .; do sleep 0.02; done
bash -c "$3" &
while :; do sleep 3600 & wait $!; done
"""
_CONTROL = """
munged --foreground --force --key-file={0}/munge.key --socket={0}/munge.socket --pid-file={0}/munged.pid \
    --log-file={0}/log/munged.log --seed-file={0}/munged.seed &
until [ -S {0}/munge.socket ]; do sleep 0.02; done
exec slurmctld -D -c
"""


def ended(job: dict[str, str]) -> bool:
    """Whether a job will not run again; job: see SlurmCluster.job."""
    return job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class NoClusterError(RuntimeError):
    """A cluster cannot be had here; the text says why."""


class SlurmCluster:
    """Started by `with`; at the end of the block nothing of it is left."""

    def __init__(self, shape: Shape | None = None) -> None:
        """Raises: NoClusterError."""
        missing = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
        if sys.platform != "linux" or os.geteuid() != 0:
            raise NoClusterError("a Slurm cluster for tests needs Linux and root")
        if missing:
            raise NoClusterError(f"not installed: {', '.join(missing)} (Debian: slurm-wlm, munge, iproute2)")
        self.shape = shape or Shape()
        # munged distrusts folders that only root may enter, and paths of sockets are short
        self.folder = Path(tempfile.mkdtemp(prefix="slurm_", dir="/tmp"))
        self.folder.chmod(0o755)
        self._hosts: dict[str, subprocess.Popen[bytes]] = {}
        self._inits: dict[str, int] = {}

    def __enter__(self) -> "SlurmCluster":
        try:
            self._up()
        except BaseException:
            self._down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._down()

    def run(
        self, *command: str, check: bool = True, environ: Mapping[str, str] | None = None, timeout: float = 60
    ) -> str:
        """Run a command on the login host; returns its stdout without the last newline.

        Args:
            check: whether a failure raises RuntimeError with what the command said.
            environ: added to its environment.
            timeout: seconds.
        """
        done = subprocess.run(
            [*self._on(CONTROL), *command],
            env=self.environment | dict(environ or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout.rstrip("\n")

    @property
    def environment(self) -> dict[str, str]:
        """Of commands on the login host and, by inheritance, of jobs."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        return inherited | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}

    def command(self, *command: str) -> list[str]:
        """Arguments of a process that runs the command on the login host; see `environment`."""
        return [*self._on(CONTROL), *command]

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of `scontrol show job`, e.g. {"JobState": "RUNNING", "Restarts": "0", ...}."""
        for _ in range(ASKED_AGAIN):
            text = self.run("scontrol", "show", "job", "--oneliner", job_id, check=False)
            if "JobState=" in text:
                break
            # the controller is busy with a node that it has just lost
            time.sleep(1)
        else:
            raise TimeoutError(f"nobody answers about job {job_id}\n{self._logs()}")
        pairs = (part.partition("=") for part in text.split())
        return {key: value for key, _, value in pairs}

    def wait_for_job(self, job_id: str, condition: Callable[[dict[str, str]], bool], timeout: float) -> None:
        """Wait until the fields of `job` fulfil the condition."""
        self.wait(lambda: condition(self.job(job_id)), f"job {job_id}: {self.job(job_id)}", timeout)

    def wait(self, condition: Callable[[], Any], what: str, timeout: float) -> None:
        """Wait until the condition holds."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {timeout} s: {what}\n{self._logs()}")
            time.sleep(POLL_S)

    def power_off(self, node: str) -> None:
        """All processes of the node are gone at once, and its peers hear nothing."""
        self.unplug(node)
        self._end(node)

    def power_on(self, node: str) -> None:
        """Boot a node that is off."""
        self._start_host(node, f"exec slurmd -D -N {node}")
        self._plug_in(node)

    @contextlib.contextmanager
    def read_only(self, node: str, folder: Path) -> Iterator[None]:
        """In the block the node can read the folder but not write there."""
        inside = ["nsenter", "-t", str(self._inits[node]), "--mount", "--pid"]
        for options in (["--bind", folder, folder], ["-o", "remount,bind,ro", folder]):
            subprocess.run([*inside, "mount", *options], check=True, env=_ENV)
        try:
            yield
        finally:
            subprocess.run([*inside, "umount", "--lazy", folder], check=True, env=_ENV)

    def unplug(self, node: str) -> None:
        """The node runs on, unheard."""
        self._in_control(f"ip link set to_{node} down")

    def plug(self, node: str) -> None:
        """Undo `unplug`."""
        self._in_control(f"ip link set to_{node} up")

    def wait_idle(self, timeout: float = UP_WITHIN_S) -> None:
        """Wait until all nodes are up and without work."""

        def idle() -> bool:
            states = self.run("sinfo", "-h", "-N", "-p", "train", "-o", "%t", check=False).split()
            return states == ["idle"] * self.shape.num_nodes

        self.wait(idle, "all nodes idle", timeout)

    def processes(self, node: str) -> list[psutil.Process]:
        """Everything that runs on a node."""
        try:
            return psutil.Process(self._inits[node]).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def _up(self) -> None:
        self._remove_hierarchies()
        write_settings(self.folder, self.shape)
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        for node in self.shape.nodes:
            for gpu in range(self.shape.gpus):
                # the null device
                os.mknod(self.folder / f"{node}-gpu{gpu}", 0o20666, os.makedev(1, 3))
        self._start_host(CONTROL, _CONTROL.format(self.folder))
        self._in_control("ip link add eth0 type bridge")
        self._in_control(f"ip addr add {address(CONTROL)}/24 dev eth0")
        self._in_control("ip link set eth0 up")
        for node in self.shape.nodes:
            self.power_on(node)
        self.wait_idle()

    def _down(self) -> None:
        for host in [*self.shape.nodes, CONTROL]:
            self._end(host)
        self._remove_hierarchies()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _remove_hierarchies(self) -> None:
        """Empty control groups that slurmd leaves behind, also those of a cluster that was killed."""
        for node in self.shape.nodes:
            for hierarchy in FREEZER.parent.glob(f"*/slurm_{node}"):
                # deepest first; whatever is still in use stays
                for folder in sorted((p for p in hierarchy.rglob("*") if p.is_dir()), reverse=True):
                    with contextlib.suppress(OSError):
                        folder.rmdir()
                with contextlib.suppress(OSError):
                    hierarchy.rmdir()

    def _start_host(self, host: str, script: str) -> None:
        log = (self.folder / f"log/{host}.out").open("ab")
        namespaces = ("--net", "--mount", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child")
        self._hosts[host] = subprocess.Popen(
            ["unshare", *namespaces, "bash", "-c", _HOST, "host", host, str(self.folder), script],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
        log.close()
        holder = psutil.Process(self._hosts[host].pid)

        def started() -> bool:
            if self._hosts[host].poll() is not None:
                raise NoClusterError(f"no namespaces can be made here: {self._logs()}")
            children = holder.children()
            # between fork and exec it still has the name of its parent
            return bool(children) and children[0].name() == "bash"

        self.wait(started, f"{host} to start", UP_WITHIN_S)
        self._inits[host] = holder.children()[0].pid

    def _plug_in(self, node: str) -> None:
        # left by a host that lost its power
        self._in_control(f"ip link del to_{node}", check=False)
        self._in_control(f"ip link add to_{node} type veth peer name eth0 netns {self._inits[node]}")
        self._in_control(f"ip link set to_{node} master eth0 up")
        inside = ["nsenter", "-t", str(self._inits[node]), "--net", "ip"]
        subprocess.run([*inside, "addr", "add", f"{address(node)}/24", "dev", "eth0"], check=True, env=_ENV)
        subprocess.run([*inside, "link", "set", "eth0", "up"], check=True, env=_ENV)

    def _in_control(self, command: str, *, check: bool = True) -> None:
        inside = ["nsenter", "-t", str(self._inits[CONTROL]), "--net"]
        subprocess.run([*inside, *command.split()], check=check, capture_output=True, env=_ENV, timeout=20)

    def _on(self, host: str) -> list[str]:
        inside = ["nsenter", "-t", str(self._inits[host]), "--net", "--uts", "--mount"]
        # another mount namespace begins in its own root
        return [*inside, "bash", "-c", 'cd "$0" && exec "$@"', os.getcwd()]

    def _end(self, host: str) -> None:
        process = self._hosts.pop(host, None)
        if process is None:
            return
        process.send_signal(signal.SIGKILL)
        process.wait(UP_WITHIN_S)
        init = self._inits.pop(host, None)
        if init is not None:
            self.wait(lambda: not _alive(init), f"{host} to end", UP_WITHIN_S)

    def _logs(self) -> str:
        texts = []
        for path in sorted((self.folder / "log").glob("*")):
            tail = path.read_text(errors="replace").splitlines()[-8:]
            texts.append("\n".join([f"{path.name}:", *tail]))
        return "\n".join(texts)


@contextlib.contextmanager
def powered_on(cluster: SlurmCluster, node: str) -> Iterator[None]:
    """Bring the node back at the end of the block, if it is off then."""
    try:
        yield
    finally:
        if node not in cluster._hosts:
            cluster.power_on(node)


_ENV = {**os.environ, "PATH": PATH}


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
