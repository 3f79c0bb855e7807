"""The msa-train command on a model so small that a step takes milliseconds."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from msa_train.training.metrics.writer import METRICS_NAME, read_metrics
from tests.helpers import fork_server
from tests.helpers.forked_command import ForkedCommand, worker_name

ROOT = Path(__file__).parents[2]
RUN_WITHIN_S = 300
POLL_S = 0.002
# what a user is promised after a worker dies, and more than enough for the kernel to end processes
DOWN_WITHIN_S = 30

NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, SEQ_LEN, NUM_EXPERTS, ROUTER_TOPK = 2, 8, 16, 512, 4, 2
GLOBAL_BATCH_SIZE, LR, WARMUP_STEPS = 2, 4e-3, 2
PROBE_EVERY = 3
TIMES = {"tokens_per_s", "step_time_s", "memory_gib", "exposed_s", "exposed_s_by_purpose"}
# in the row of the step during which it was finished
TIMES |= {"checkpoint_step", "checkpoint_pause_s", "checkpoint_write_s", "checkpoint_bytes"}
# layer 1 attends to everything and has a dense feed-forward network; 2 and 3 are sparse in both
SPARSE_LAYERS = ("layer02", "layer03")
TINY = (
    "run=smoke",
    "model.num_layers=3",
    "model.hidden_size=32",
    "model.num_heads=4",
    f"model.num_kv_heads={NUM_KV_HEADS}",
    f"model.head_dim={HEAD_DIM}",
    "model.rotary_dim=4",
    'model.layer_attention="full,msa"',
    "model.init_std=0.02",
    "model.embedding_init_std=0.02",
    "model.embedding_shared_std=0",
    "model.rope_theta=1000",
    "model.num_dense_ffn_layers=1",
    "model.ffn_hidden_size=32",
    f"model.num_experts={NUM_EXPERTS}",
    f"model.moe_router_topk={ROUTER_TOPK}",
    "model.moe_ffn_hidden_size=16",
    "model.shared_expert_hidden_size=16",
    f"attention.block_size={BLOCK_SIZE}",
    "attention.topk=4",
    "attention.local_blocks=1",
    "attention.index_head_dim=8",
    f"data.seq_len={SEQ_LEN}",
    "optim=cosine",
    f"optim.lr={LR}",
    "optim.schedule=constant",
    f"optim.warmup_steps={WARMUP_STEPS}",
    f"train.global_batch_size={GLOBAL_BATCH_SIZE}",
    "train.validate_every=4",
    "checkpoint.every=4",
    "logging.tensorboard=false",
    f"logging.attention_every={PROBE_EVERY}",
    "logging.attention_queries=20",
)


class Training:
    """One start of the command. At the end of a `with` block nothing of it is left running."""

    def __init__(self, *arguments: str, program: bool = False, module: str = "launchers.train") -> None:
        """program: as users start it; else forked, see `forked_command`. module: of another command."""
        environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "CUDA_VISIBLE_DEVICES": ""}
        # files, because nobody reads a pipe while a test waits for a step
        self._output = tempfile.NamedTemporaryFile()  # noqa: SIM115 (closed by __exit__)
        self._errors = tempfile.NamedTemporaryFile()  # noqa: SIM115
        self.process: subprocess.Popen[bytes] | ForkedCommand
        if program or not fork_server.is_usable():
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env=environ,
                stdout=self._output,
                stderr=self._errors,
            )
        else:
            files = {"stdout": self._output.name, "stderr": self._errors.name}
            self.process = ForkedCommand(arguments, cwd=ROOT, environ=environ, module=module, **files)

    def __enter__(self) -> "Training":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        self._output.close()
        self._errors.close()

    @property
    def output(self) -> str:
        """What it has written to stdout."""
        return _content(self._output)

    @property
    def errors(self) -> str:
        """What it has written to stderr."""
        return _content(self._errors)

    def end(self, timeout: float = RUN_WITHIN_S) -> int:
        """Wait for its end; returns the exit code."""
        return self.process.wait(timeout)

    def wait_until(self, condition: Callable[[], Any], what: str) -> None:
        """Wait until the condition holds, while the command runs."""
        deadline = time.monotonic() + RUN_WITHIN_S
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.output}\n{self.errors}"
            assert time.monotonic() < deadline, f"{what} did not happen:\n{self.output}\n{self.errors}"
            time.sleep(POLL_S)

    def wait_for_step(self, run_dir: Path, step: int) -> None:
        """Wait until metrics.jsonl has the step."""
        self.wait_until(lambda: last_step(run_dir) >= step, f"step {step}")

    def processes(self) -> list[psutil.Process]:
        """The launcher and everything that it started."""
        try:
            launcher = psutil.Process(self.process.pid)
            return [launcher, *launcher.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def worker(self, rank: int) -> psutil.Process:
        """The process of one rank."""
        workers = self.processes()[1:]
        (found,) = [
            p for p in workers if p.name() == worker_name(rank) or p.environ().get("RANK") == str(rank)
        ]
        return found

    def kill(self, processes: list[psutil.Process] | None = None) -> None:
        """SIGKILL for the launcher and all workers at once, as when a machine goes down.

        Args:
            processes: what `processes` returned before, to lose no time.
        """
        processes = self.processes() if processes is None else processes
        for process in processes:
            # one may have ended in the meantime
            if process.is_running():
                process.send_signal(signal.SIGKILL)
        self.process.wait(DOWN_WITHIN_S)
        wait_gone(processes)


def train(*arguments: str, program: bool = False, module: str = "launchers.train") -> str:
    """Run the command to a good end; returns its stdout. It has nothing to say on stderr."""
    with Training(*arguments, program=program, module=module) as training:
        code = training.end()
        assert code == 0, training.output + training.errors
        assert training.errors == ""
        return training.output


def wait_gone(processes: list[psutil.Process]) -> None:
    """Wait until none of the processes runs."""
    deadline = time.monotonic() + DOWN_WITHIN_S
    while alive := [process for process in processes if _runs(process)]:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(POLL_S)


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics as far as it follows from what is computed."""
    return {key: value for key, value in row.items() if key not in TIMES}


def last_step(run_dir: Path) -> int:
    """The newest step in metrics.jsonl, 0 without one."""
    path = run_dir / METRICS_NAME
    rows = read_metrics(path) if path.exists() else []
    return rows[-1]["step"] if rows else 0


def write_corpus(folder: Path) -> None:
    """Sixty texts of a few words up to more than a sequence, whose next word follows from the last two."""
    folder.mkdir()
    for number in range(60):
        words = [f"w{(number * 7 + i * i) % 97}" for i in range(5 + 13 * number % 300)]
        (folder / f"{number}.txt").write_text(" ".join(words))


def _is_worker(process: psutil.Process, rank: int) -> bool:
    return process.name() == worker_name(rank) or process.environ().get("RANK") == str(rank)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _content(file: Any) -> str:
    # without moving the position, which the processes that write share
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()
