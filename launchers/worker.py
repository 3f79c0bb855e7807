"""Run one worker process: `launchers.worker CONFIG.yaml`, or `run_entry` under torchrun and srun.

There is one for each rank. It may outlive neither its launcher nor its own failure: a rank that lives on
keeps a GPU, and the others wait for it in a collective.
"""

import ctypes
import faulthandler
import importlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from launchers.cli.command_line import NEXT_STAGE, leave
from launchers.cli.output import steady_output
from launchers.cli.quick_imports import quick_imports
from launchers.hydra_config.compose import load_run
from msa_train.config import RunConfig
from msa_train.config.staging.views import layout_config
from msa_train.runtime import preemption
from msa_train.runtime.last_words import LAUNCHER_PID, record

TRAINING = "msa_train.training.worker:run_worker"
# of prctl(2): the signal that this process gets when the thread that started it ends
PR_SET_PDEATHSIG = 1
_STDOUT_LOST = "msa-train: warning: stdout is lost, the run goes on"


def main(argv: Sequence[str] | None = None) -> None:
    """Run a worker of the local launcher, and end the process.

    Args:
        argv: CONFIG.yaml and, for tests, another MODULE:FUNCTION; those of the process by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _follow_launcher()
    with steady_output(_STDOUT_LOST):
        goes_on = run_entry(load_run(arguments[0]), *arguments[1:])
        # destructors of process groups may wait for ranks that have ended
        leave(NEXT_STAGE if goes_on else 0)


def run_entry(config: RunConfig, entry: str = TRAINING) -> bool:
    """Run a worker to its end. An exception is recorded for the launcher and ends the process at once.

    The exit code is 1 then. Signals get their handlers here, before torch is imported.

    Args:
        config: the whole run.
        entry: "module:function" to call with the configuration.

    Returns:
        Whether the run goes on in processes of another stage.
    """
    # before the first import of torch, which takes seconds
    preemption.install_handlers()
    faulthandler.enable()
    accept_fallbacks()
    if any(layout_config(config, name).parallel.tp_size > 1 for name in config.stages or [""]):
        # the order in which they are launched is then that in which a GPU begins them: Megatron launches the
        # collectives of tensor parallelism just before the products that hide them
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with steady_output(_STDOUT_LOST):
        try:
            module, _, function = entry.partition(":")
            with quick_imports():
                called = getattr(importlib.import_module(module), function)
            return bool(called(config))
        except Exception as error:
            record(error)
            leave(1)


def accept_fallbacks() -> None:
    """Silence what no user can act on: absent optional packages of Megatron, and its use of old names."""
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex)")
    # its own default for CUDA graphs, and its reader of checkpoints
    warnings.filterwarnings("ignore", message="full scope is deprecated")
    warnings.filterwarnings("ignore", message=".*load_state_dict. is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
    # how megatron-core 0.19 reads a checkpoint: by position, each rank for itself, and common.pt
    warnings.filterwarnings("ignore", message="The argument order of load has been changed")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninit")
    logging.getLogger("megatron.core.dist_checkpointing.strategies.common").setLevel(logging.ERROR)
    # with tensor parallelism its layers for experts, which are not cut
    warnings.filterwarnings("ignore", message=".*sequence_parallel. is set to .True., but tensor model")
    # on GPUs: its reductions by the names before torch 2.13, its masters cut from larger tensors; barriers on
    # the current device, which every worker has set
    old_names = ".*(reduce_scatter_tensor|all_gather_into_tensor). is deprecated"
    warnings.filterwarnings("ignore", message=old_names, category=FutureWarning)
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    # a build of torch for GPUs on a machine without one
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def _follow_launcher() -> None:
    """Have the kernel kill this process when the launcher ends, even by SIGKILL; end quietly on Ctrl-C.

    No handler of the launcher's runs when the system's out-of-memory killer takes it, and nobody is left then
    to end its workers but the kernel. SIGKILL, for a worker can save nothing any more: its peers are killed
    as well.
    """
    # the launcher ends survivors by it too: a KeyboardInterrupt in the log of each would look like the cause
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # it may have ended before the request was made: its children then belong to another process already
    if os.getppid() != int(launcher):
        os._exit(1)


if __name__ == "__main__":
    main()
