"""Work of a test on one GPU or, where there is none and it may be, on the pretended one.

Each piece of work is a rank of its own: a world of one, joined by NCCL, whose failure, an illegal access say,
leaves the others alone. On a GPU nearly all of its time is compiling, on one core each, so that all of them
are begun together when the first is asked for.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ClassVar

import pytest
import torch

from tests.helpers.pretended_gpu.build import needs_pretended_gpu
from tests.helpers.spawn import run_ranks
from tests.helpers.triton_env import needs_triton

# not the pretended one, which a whole command may have been given
HAS_GPU = torch.version.cuda is not None and torch.cuda.is_available()
# As many processes at a time, of which each holds half a gigabyte of the GPU.
MOST_JOBS = 20

needs_gpu = pytest.mark.skipif(
    not HAS_GPU, reason="no GPU: kernels of Triton, CUDA graphs and a GPU's arithmetic cannot be seen without"
)
# what computes the operators: the pretended GPU launches nothing
KERNEL = "triton" if HAS_GPU else "cpu"


def needs_device(test: Any) -> Any:
    """Mark a test of what the pretended GPU can do too."""
    return needs_triton(test) if HAS_GPU else needs_pretended_gpu(test)


def needs_triton_gpu(test: Any) -> Any:
    """Mark a test of what only a GPU can do, with Triton."""
    return needs_triton(needs_gpu(test))


class Job:
    """fn(rank, world_size, *args) as the only rank of its world.

    fn: at module level of an importable module. device: of the rank; None: the GPU or the pretended one.
    """

    _all: ClassVar[list["Job"]] = []
    _threads: ClassVar[ThreadPoolExecutor | None] = None

    def __init__(self, fn: Callable[..., Any], *args: Any, device: str | None = None) -> None:
        self._call = (fn, *args)
        self._device = device or ("cuda" if HAS_GPU else "pretended")
        self._future: Future[Any] | None = None
        Job._all.append(self)

    def result(self) -> Any:
        """What fn returned; what it raised is raised, at every call."""
        if Job._threads is None:
            Job._threads = ThreadPoolExecutor(MOST_JOBS if HAS_GPU else 1)
        for job in Job._all if HAS_GPU else [self]:
            if job._future is None:
                job._future = Job._threads.submit(job._run)
        assert self._future is not None
        return self._future.result()

    def wait(self) -> None:
        """Until it has ended, well or badly."""
        if Job._threads is None:
            return
        assert self._future is not None
        self._future.exception()

    def _run(self) -> Any:
        fn, *args = self._call
        (result,) = run_ranks(1, fn, *args, device=self._device, timeout_s=240)
        return result
