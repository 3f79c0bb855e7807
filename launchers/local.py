"""Local workers, started and watched by torch's elastic agent."""

import inspect
import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import cast

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SignalException, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from launchers.failure import WorkerFailure, report
from launchers.worker import LAUNCHER_PID, TRAINING

MONITOR_INTERVAL_S = 0.1
# between SIGTERM and SIGKILL
GRACE_S = 10


class RunDirLogs(LogsSpecs):
    """Rank 0 keeps the terminal; the others write to `<folder>/rank{n}.out` and `.err`."""

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
        for rank, env in envs.items():
            # an empty name leaves the stream alone, so that a progress bar still finds a terminal
            destination.stdouts[rank] = str(self._folder / f"rank{rank}.out") if rank else ""
            destination.stderrs[rank] = str(self._folder / f"rank{rank}.err") if rank else ""
            destination.error_files[rank] = str(self._folder / f"rank{rank}.error.json")
            env["TORCHELASTIC_ERROR_FILE"] = destination.error_files[rank]
        return destination


class LocalAgent(LocalElasticAgent):
    """torch's agent, which notes when each worker ended and does not wait 30 s for one that hangs."""

    def __init__(self, spec: WorkerSpec, logs_specs: LogsSpecs) -> None:
        options = {}
        # added in torch 2.13; before, it is a fixed 30 s
        if "shutdown_timeout" in inspect.signature(LocalElasticAgent).parameters:
            options["shutdown_timeout"] = GRACE_S
        super().__init__(spec, logs_specs, **options)
        self.end_times_s: dict[int, float] = {}
        self.ended_here: set[int] = set()

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        if isinstance(self._pcontext, SubprocessContext):
            self._note_ends(self._pcontext)
            if any(handler.proc.poll() for handler in self._pcontext.subprocess_handlers.values()):
                self._end_survivors(self._pcontext)
        # torch's decorator hides the signature
        return super()._monitor_workers(worker_group)  # pyright: ignore[reportCallIssue]

    def _note_ends(self, context: SubprocessContext) -> None:
        for rank, handler in context.subprocess_handlers.items():
            if handler.proc.poll() is not None:
                self.end_times_s.setdefault(rank, time.time())

    def _end_survivors(self, context: SubprocessContext) -> None:
        deadline = time.monotonic() + GRACE_S
        for death_signal in (signal.SIGTERM, signal.SIGKILL):
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


def launch_workers(config_path: Path, num_processes: int, *, entry: str = TRAINING) -> int:
    """Start workers on this machine and wait for them.

    Args:
        config_path: resolved configuration; logs go beside it.
        num_processes: number of workers.
        entry: "module:function" that each worker calls with the configuration.

    Returns:
        Exit code: 0, 1 after a failure (which is reported on stderr), 128 + signal if stopped by one.
    """
    os.environ[LAUNCHER_PID] = str(os.getpid())
    if os.path.exists("/sys/class/net/lo"):
        # all workers are here; a host name that does not resolve must not matter
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if "LOGLEVEL" not in os.environ:
        _silence_elastic()
    logs = config_path.parent / "logs" / time.strftime("%Y%m%d-%H%M%S")
    arguments = ("-m", "launchers.worker", str(config_path), entry)
    agent = LocalAgent(_worker_spec(num_processes, arguments), RunDirLogs(logs))
    try:
        result = cast(RunResult, agent.run())
    except SignalException as error:
        print(f"msa-train: stopped by {error.sigval.name}", file=sys.stderr, flush=True)
        return 128 + error.sigval
    if not result.is_failed():
        return 0
    failures = {rank: _worker_failure(rank, item, agent, logs) for rank, item in result.failures.items()}
    print(report(failures, world_size=num_processes), file=sys.stderr, flush=True)
    return 1


def _worker_spec(num_processes: int, arguments: tuple[str, ...]) -> WorkerSpec:
    rendezvous = RendezvousParameters(
        backend="c10d",
        # port 0: the store binds a free port itself, and workers are told which
        endpoint="127.0.0.1:0",
        run_id=uuid.uuid4().hex,
        min_nodes=1,
        max_nodes=1,
        local_addr="127.0.0.1",
    )
    return WorkerSpec(
        role="msa-train",
        local_world_size=num_processes,
        entrypoint=sys.executable,
        args=arguments,
        rdzv_handler=get_rendezvous_handler(rendezvous),
        max_restarts=0,
        monitor_interval=MONITOR_INTERVAL_S,
        local_addr="127.0.0.1",
    )


def _worker_failure(rank: int, failure: ProcessFailure, agent: LocalAgent, logs: Path) -> WorkerFailure:
    message = failure.error_file_data.get("message")
    recorded = message if isinstance(message, dict) else {}
    extra = recorded.get("extraInfo", {})
    log = logs / f"rank{rank}.err"
    return WorkerFailure(
        rank=rank,
        pid=failure.pid,
        exit_code=failure.exitcode,
        time_s=float(extra.get("time", agent.end_times_s.get(rank, failure.timestamp))),
        error=recorded.get("message", ""),
        traceback=extra.get("py_callstack", ""),
        ended_by_launcher=rank in agent.ended_here,
        log=log if log.is_file() else None,
    )


def _silence_elastic() -> None:
    """Its log lines repeat, at length, what the report says; LOGLEVEL=INFO brings them back."""
    logger = logging.getLogger("torch.distributed")
    logger.handlers = [logging.NullHandler()]
    logger.propagate = False
