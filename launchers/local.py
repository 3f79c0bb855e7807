"""Workers of this machine, alone or as one node of several, started and watched by torch's elastic agent."""

import inspect
import json
import logging
import math
import os
import secrets
import signal
import subprocess
import sys
import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from launchers.code_path import worker_arguments
from launchers.command_line import STOPPED
from launchers.failure import WorkerFailure, report
from launchers.join import Node
from launchers.output import say
from launchers.private_store import OneMachine, private_store
from launchers.worker import TRAINING
from msa_train.config.environment import STORE_FILE
from msa_train.training import stop
from msa_train.training.last_words import LAUNCHER_PID, spare_file

MONITOR_INTERVAL_S = 0.1
# between SIGINT, which ends a worker at once, and SIGKILL for those that are stopped
GRACE_S = 3
# until workers are asked again to stop: one that was just starting may not have heard it
ASK_AGAIN_S = 5.0
# for all nodes to come together
RENDEZVOUS_S = 600


class RunDirLogs(LogsSpecs):
    """Rank 0 keeps the terminal; the others, by their rank in the job, write to `rank{n}.out` and `.err`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(log_dir=str(folder))
        self._folder = folder

    @property
    def root_log_dir(self) -> str:
        return str(self._folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Place the output of each local rank, and tell the worker where to record an exception."""
        self._folder.mkdir(parents=True, exist_ok=True)
        destination = LogsDest()
        for local_rank, env in envs.items():
            rank = int(env["RANK"])
            # an empty name leaves the stream alone, so that a progress bar still finds a terminal
            destination.stdouts[local_rank] = str(self._folder / f"rank{rank}.out") if rank else ""
            destination.stderrs[local_rank] = str(self._folder / f"rank{rank}.err") if rank else ""
            destination.error_files[local_rank] = str(self._folder / f"rank{rank}.error.json")
            env["TORCHELASTIC_ERROR_FILE"] = destination.error_files[local_rank]
        return destination


class LocalAgent(LocalElasticAgent):
    """torch's agent, with two differences.

    It notes when each worker ended and does not wait 30 s for one that hangs. And signals that ask a run to
    stop do not end it: it hands them on and waits for the workers, which save first.
    """

    def __init__(self, spec: WorkerSpec, logs_specs: LogsSpecs) -> None:
        options = {}
        # added in torch 2.13; before, it is a fixed 30 s
        if "shutdown_timeout" in inspect.signature(LocalElasticAgent).parameters:
            options["shutdown_timeout"] = GRACE_S
        super().__init__(spec, logs_specs, **options)
        self.end_times_s: dict[int, float] = {}
        self.ended_here: set[int] = set()
        self._asked_s = -math.inf

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        # A program that starts inherits what is ignored: until a worker listens, a signal must not end it.
        stop.ignore()
        started = super()._start_workers(worker_group)  # pyright: ignore[reportCallIssue]
        # torch has set handlers of its own in there
        stop.listen()
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if isinstance(self._pcontext, SubprocessContext):
            self._note_ends(self._pcontext)
            if any(handler.proc.poll() for handler in self._pcontext.subprocess_handlers.values()):
                self._end_survivors(self._pcontext)
            elif stop.requested():
                self._ask_to_stop(self._pcontext)
        # torch's decorator hides the signature
        return super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]

    def _ask_to_stop(self, context: SubprocessContext) -> None:
        if time.monotonic() - self._asked_s < ASK_AGAIN_S:
            return
        self._asked_s = time.monotonic()
        for handler in context.subprocess_handlers.values():
            if handler.proc.poll() is None:
                handler.proc.send_signal(stop.requested())

    def _note_ends(self, context: SubprocessContext) -> None:
        for rank, handler in context.subprocess_handlers.items():
            if handler.proc.poll() is not None:
                self.end_times_s.setdefault(rank, time.time())

    def _end_survivors(self, context: SubprocessContext) -> None:
        deadline = time.monotonic() + GRACE_S
        # they have nothing to save: not SIGTERM, which asks them to finish a step
        for death_signal in (signal.SIGINT, signal.SIGKILL):
            for rank, handler in context.subprocess_handlers.items():
                if handler.proc.poll() is None:
                    self.ended_here.add(rank)
                    handler.close(death_signal)
            for handler in context.subprocess_handlers.values():
                try:
                    handler.proc.wait(max(deadline - time.monotonic(), 0.1))
                except subprocess.TimeoutExpired:
                    continue
        self._note_ends(context)


def launch_workers(
    config_path: Path, num_processes: int, *, entry: str = TRAINING, node: Node | None = None
) -> int:
    """Start workers on this machine and wait for them.

    Args:
        config_path: resolved configuration in run_dir; logs go beside it.
        num_processes: number of workers on this machine.
        entry: "module:function" that each worker calls with the configuration.
        node: this machine's place in a job of several; every node calls this function.

    Returns:
        Exit code: 0; 1 after a failure (which is reported on stderr); 75 if the run was asked to stop and has
        saved, so that another start goes on; 128 + signal if stopped otherwise. On a node of several 0 in
        place of 75, for Slurm takes any other code of one node as a reason to kill the rest.
    """
    stop.listen()
    os.environ[LAUNCHER_PID] = str(os.getpid())
    if "LOGLEVEL" not in os.environ:
        _silence_elastic()
    logs = _new_logs(config_path.parent)
    # torch fills in $-names of arguments
    arguments = tuple(text.replace("$", "$$") for text in worker_arguments(str(config_path), entry))
    with ExitStack() as stack:
        if _is_alone(node):
            _stay_on_this_machine(stack)
        agent = LocalAgent(_worker_spec(num_processes, arguments, node), RunDirLogs(logs))
        try:
            result = cast(RunResult, agent.run())
        except SignalException as error:
            say(f"msa-train: stopped by {error.sigval.name}", error=True)
            return 128 + error.sigval
        first_rank = node.rank * num_processes if node else 0
        # the folder of the store, where some may be recorded, goes with the block
        failures = {
            rank: _worker_failure(rank, rank - first_rank, item, agent, logs)
            for rank, item in result.failures.items()
        }
    if not result.is_failed():
        return _good_end(config_path.parent, alone=node is None)
    world_size = num_processes * (node.count if node else 1)
    text = report(failures, world_size=world_size, first_rank=first_rank, log_folder=logs)
    say(text, lines=True, error=True)
    return 1


def _is_alone(node: Node | None) -> bool:
    """Whether all workers of the job are on this machine."""
    return node is None or node.count == 1


def _stay_on_this_machine(stack: ExitStack) -> None:
    """Workers meet in a file that is the user's alone, and connect over the loopback interface."""
    os.environ[STORE_FILE] = str(stack.enter_context(private_store()))
    if os.path.exists("/sys/class/net/lo"):
        # a host name that does not resolve must not matter
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _new_logs(run_dir: Path) -> Path:
    """A folder for the output of this start, made here so that nobody has placed links in it.

    Example: logs/20260101-120000, or logs/20260101-120000-5be1c3d2 where another node has made that.
    """
    logs = run_dir / "logs" / time.strftime("%Y%m%d-%H%M%S")
    try:
        logs.mkdir(parents=True)
    except FileExistsError:
        logs = logs.with_name(f"{logs.name}-{secrets.token_hex(4)}")
        logs.mkdir()
    return logs


def _good_end(run_dir: Path, *, alone: bool) -> int:
    stopped = stop.read_stopped(run_dir)
    if stopped is None or not alone:
        return 0
    if stopped.saved:
        return STOPPED
    say(f"msa-train: stopped by {stopped.signal}", error=True)
    return 128 + signal.Signals[stopped.signal]


def _worker_spec(num_processes: int, arguments: tuple[str, ...], node: Node | None) -> WorkerSpec:
    local_addr = "127.0.0.1" if node is None else None
    return WorkerSpec(
        role="msa-train",
        local_world_size=num_processes,
        entrypoint=sys.executable,
        args=arguments,
        rdzv_handler=_rendezvous(node),
        max_restarts=0,
        monitor_interval=MONITOR_INTERVAL_S,
        local_addr=local_addr,
    )


def _rendezvous(node: Node | None) -> RendezvousHandler:
    if node is None or _is_alone(node):
        return OneMachine(uuid.uuid4().hex)
    # Ranks follow the order of the nodes that Slurm gave; c10d would sort host names, node10 before node2.
    return get_rendezvous_handler(
        RendezvousParameters(
            backend="static",
            endpoint=f"{node.head}:{node.port}",
            run_id=node.start,
            min_nodes=node.count,
            max_nodes=node.count,
            rank=node.rank,
            timeout=RENDEZVOUS_S,
        )
    )


def _worker_failure(
    rank: int, local_rank: int, failure: ProcessFailure, agent: LocalAgent, logs: Path
) -> WorkerFailure:
    message = failure.error_file_data.get("message")
    # torch has a text of its own where there is no file
    recorded = message if isinstance(message, dict) else _spare_message(rank)
    extra = recorded.get("extraInfo", {})
    log = logs / f"rank{rank}.err"
    return WorkerFailure(
        rank=rank,
        pid=failure.pid,
        exit_code=failure.exitcode,
        time_s=float(extra.get("time", agent.end_times_s.get(local_rank, failure.timestamp))),
        error=recorded.get("message", ""),
        traceback=extra.get("py_callstack", ""),
        ended_by_launcher=local_rank in agent.ended_here,
        log=log if log.is_file() else None,
    )


def _spare_message(rank: int) -> dict[str, Any]:
    """What a worker has recorded beside the store, as the disk of run_dir was full."""
    path = spare_file(os.environ, rank)
    try:
        return {} if path is None else json.loads(path.read_bytes())["message"]
    except (OSError, ValueError):
        return {}


def _silence_elastic() -> None:
    """Its log lines repeat, at length, what the report says; LOGLEVEL=INFO brings them back."""
    logger = logging.getLogger("torch.distributed")
    logger.handlers = [logging.NullHandler()]
    logger.propagate = False
