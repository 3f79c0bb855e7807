"""Start and watch the workers of this machine, alone or as one node of several, by torch's elastic agent.

Each node has one agent, which starts this node's workers and looks after its own alone: on 32 nodes of 8 GPUs
32 agents with 8 workers each. Node 0's hosts the store at head:port, to which the other 31 agents and all 256
workers connect. An agent polls its own workers by waitpid every MONITOR_INTERVAL_S, which costs no network.

There are no restarts here. A failure ends all workers of the node within GRACE_S; those of other nodes notice
by closed connections, and srun's --kill-on-bad-exit ends them. The batch script then starts all of it again
from the last checkpoint.
"""

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

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from launchers.cli.command_line import NEXT_STAGE, STOPPED
from launchers.cli.output import say
from launchers.local.code_path import worker_arguments
from launchers.local.failure_report import WorkerFailure, report
from launchers.local.job_environment import Node
from launchers.local.private_store import OneMachine, private_store
from launchers.worker import TRAINING
from msa_train.config.environment import STORE_FILE
from msa_train.runtime import preemption
from msa_train.runtime.last_words import LAUNCHER_PID, spare_file

MONITOR_INTERVAL_S = 0.1
# between SIGINT, which ends a worker at once, and SIGKILL for those that are stopped
GRACE_S = 3
# until workers are asked again to stop: one that was just starting may not have heard it
ASK_AGAIN_S = 5.0
# for all nodes to come together
RENDEZVOUS_S = 600


class RunDirLogs(LogsSpecs):
    """Place what workers print: rank 0 keeps the terminal, the others write to files of their own.

    Example: rank 9, the second worker of the second node of 8 -> rank9.out, rank9.err, and rank9.error.json
    if it raises. A start on 32 nodes of 8 workers makes 32 folders of 16 files, of 14 on node 0.
    """

    def __init__(self, folder: Path) -> None:
        """Take the folder, which `reify` makes if need be."""
        super().__init__(log_dir=str(folder))
        self._folder = folder

    @property
    def root_log_dir(self) -> str:
        """Return the folder, for torch."""
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
    """Change torch's agent in three ways.

    It notes when each worker ended and does not wait 30 s for one that hangs. Signals that ask a run to stop
    do not end it: it hands them on and waits for the workers, which save first. And workers that all end with
    NEXT_STAGE have not failed.
    """

    def __init__(self, spec: WorkerSpec, logs_specs: LogsSpecs) -> None:
        """Make an agent that has started nothing yet; its `run` does."""
        options = {}
        # added in torch 2.13; before, it is a fixed 30 s
        if "shutdown_timeout" in inspect.signature(LocalElasticAgent).parameters:
            options["shutdown_timeout"] = GRACE_S
        super().__init__(spec, logs_specs, **options)
        self.end_times_s: dict[int, float] = {}
        "seconds since 1970 at which an end was noticed, by local rank"
        self.ended_here: set[int] = set()
        "local ranks that this agent ended because another one had failed"
        self.goes_on = False
        "all workers have ended for those of the next stage"
        self._asked_s = -math.inf
        "when workers were last asked to stop, on the monotonic clock"

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        """Start workers that ignore signals which ask a run to stop, until they have handlers of their own.

        A program that starts inherits what is ignored, but no handler: without this a signal in the seconds
        before a worker listens would kill it, and the run would end without a checkpoint.
        """
        preemption.ignore()
        started = super()._start_workers(worker_group)  # pyright: ignore[reportCallIssue]
        # torch has set handlers of its own in there
        preemption.install_handlers()
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Look at the workers once: note ends, end the rest after a failure, hand on a request to stop."""
        if isinstance(self._pcontext, SubprocessContext):
            # before torch looks: it ends all workers at once, and then all would have ended just now
            self._note_ends(self._pcontext)
            codes = [handler.proc.poll() for handler in self._pcontext.subprocess_handlers.values()]
            if any(code not in (None, 0, NEXT_STAGE) for code in codes):
                self._end_survivors(self._pcontext)
            elif NEXT_STAGE in codes:
                # torch would take the code for a failure, and end the others
                return self._await_next_stage(codes, worker_group)
            elif preemption.signal_received():
                self._ask_to_stop(self._pcontext)
        # torch's decorator hides the signature
        return super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]

    def _await_next_stage(self, codes: list[int | None], worker_group: WorkerGroup) -> RunResult:
        """Wait until all have ended; they have met in a barrier, so no other one is at work any more."""
        if None in codes:
            return RunResult(state=WorkerState.HEALTHY)
        self.goes_on = True
        # torch looks every worker up
        values = {worker.global_rank: None for worker in worker_group.workers}
        return RunResult(state=WorkerState.SUCCEEDED, return_values=values)

    def _ask_to_stop(self, context: SubprocessContext) -> None:
        """Hand the signal on to all workers, and again every ASK_AGAIN_S."""
        if time.monotonic() - self._asked_s < ASK_AGAIN_S:
            return
        self._asked_s = time.monotonic()
        for handler in context.subprocess_handlers.values():
            if handler.proc.poll() is None:
                handler.proc.send_signal(preemption.signal_received())

    def _note_ends(self, context: SubprocessContext) -> None:
        """Note the time at which an end is first seen, late by MONITOR_INTERVAL_S at most."""
        for rank, handler in context.subprocess_handlers.items():
            if handler.proc.poll() is not None:
                self.end_times_s.setdefault(rank, time.time())

    def _end_survivors(self, context: SubprocessContext) -> None:
        """End the workers that still run: SIGINT to all, SIGKILL after GRACE_S to those that are left."""
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
        Exit code: 0; NEXT_STAGE if run_dir/next_stage.json says how to go on; 1 after a failure (which is
        reported on stderr); 75 if the run was asked to stop and has saved, so that another start goes on; 128
        + signal if stopped otherwise. On a node of several 0 in place of 75 and NEXT_STAGE, for srun
        --kill-on-bad-exit kills the rest after any other code of one node.
    """
    preemption.install_handlers()
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
            # has done its part; another one failed after it
            if item.exitcode != NEXT_STAGE
        }
    if agent.goes_on:
        return NEXT_STAGE if node is None else 0
    if not result.is_failed():
        return _good_end(config_path.parent, alone=node is None)
    world_size = num_processes * (node.count if node else 1)
    text = report(failures, world_size=world_size, first_rank=first_rank, log_folder=logs)
    say(text, lines=True, error=True)
    return 1


def _is_alone(node: Node | None) -> bool:
    """Tell whether all workers of the job are on this machine."""
    return node is None or node.count == 1


def _stay_on_this_machine(stack: ExitStack) -> None:
    """Let workers meet in a file that is the user's alone, and connect over the loopback interface.

    Without it they would listen on the address of the host name: that may not resolve, may change while a
    laptop moves to another network, and lets other machines connect.
    """
    os.environ[STORE_FILE] = str(stack.enter_context(private_store()))
    if os.path.exists("/sys/class/net/lo"):
        # a host name that does not resolve must not matter
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _new_logs(run_dir: Path) -> Path:
    """Make a folder for the output of this start; made here, so that nobody has placed links in it.

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
    """Choose the exit code where all workers ended with 0: finished, stopped and saved, or just stopped."""
    stopped = preemption.read_stopped(run_dir)
    if stopped is None or not alone:
        return 0
    if stopped.saved:
        return STOPPED
    say(f"msa-train: stopped by {stopped.signal}", error=True)
    return 128 + signal.Signals[stopped.signal]


def _worker_spec(num_processes: int, arguments: tuple[str, ...], node: Node | None) -> WorkerSpec:
    """Describe the workers to torch."""
    # alone nobody needs this machine's name, and torch need not look it up
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
    """Choose how agents meet: alone in memory, several at a store that node 0 hosts."""
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
    """Put together what is known of a worker's end: exit code, time, what it recorded, its output."""
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
    """Read what a worker has recorded beside the store, as the disk of run_dir was full; {} if nothing."""
    path = spare_file(os.environ, rank)
    try:
        return {} if path is None else json.loads(path.read_bytes())["message"]
    except (OSError, ValueError):
        return {}


def _silence_elastic() -> None:
    """Drop the log lines of torch's agent, which repeat at length what the report says.

    LOGLEVEL=INFO brings them back.
    """
    logger = logging.getLogger("torch.distributed")
    logger.handlers = [logging.NullHandler()]
    logger.propagate = False
