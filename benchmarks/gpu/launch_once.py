"""Launch one operator once, warmed up, for a profiler that is told which kernel to look at.

    ncu --profile-from-start off -k regex:^attend_kernel -c 1 python benchmarks/gpu/launch_once.py forward
    python benchmarks/gpu/launch_once.py scoring --smoke --device cpu      # tiny: does it run?

Profiling is on around the last call of the operator only, and begins with the largest launch of its kernel in
the later half of the call: operators go through the queries in portions, of which the first sees few keys and
finds all of them in the cache, and a portion's whole and diagonal blocks are launched apart. M3's shape, one
document, independent random values.
"""

# ruff: noqa: E402
import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch
from msa_kernels.block_sparse_attention.across_pools import output_delta
from msa_kernels.block_sparse_attention.tiled import pool_backward, pool_forward
from msa_kernels.block_sparse_attention.types import KlTerm

from benchmarks.gpu.problem import M3, SMOKE, LayerSizes, Tensors, make_groups, make_index, select

KERNELS = {
    "scoring": "select_blocks_kernel",
    "forward": "attend_kernel",
    "backward": "attend_backward_kernel",
}
SEQ_LEN, SMOKE_SEQ_LEN = 2**17, 64


def operator(what: str, tensors: Tensors, sizes: LayerSizes, seq_len: int) -> Callable[[], object]:
    """Return the call to be profiled, with all its inputs made.

    Args:
        what: "scoring", "forward" (attention alone) or "backward" (with the KL loss).
    """
    index = make_index(tensors, sizes, seq_len)
    if what == "scoring":
        return lambda: select(index, sizes, "auto")
    ids = select(index, sizes, "auto")
    problem = make_groups(tensors, sizes, index, ids, with_kl=what == "backward")
    queries, pool, block_table = problem.queries, problem.pool, problem.block_table
    if what == "forward":
        return lambda: pool_forward(queries, pool, block_table)
    part = pool_forward(queries, pool, block_table)
    assert part.lse_index is not None, "made with an index branch"
    dout = problem.dout
    delta = output_delta(dout, part.out.to(dout.dtype))
    term = KlTerm(part.lse_index, weight=1.0)
    return lambda: pool_backward(queries, pool, block_table, dout, delta, part.lse, term)


class Launches:
    """Record the programs of each launch of one Triton kernel, and call something before one of them.

    Finds the kernel in the modules that have been imported, which the first call of its operator does.
    """

    def __init__(self, name: str) -> None:
        self.programs: list[int] = []
        self.before: dict[int, Callable[[], object]] = {}
        modules = [module for key, module in sys.modules.items() if key.startswith("msa_kernels.")]
        found = {id(k): k for k in (getattr(module, name, None) for module in modules) if hasattr(k, "run")}
        for kernel in found.values():
            self._watch(kernel)

    @property
    def chosen(self) -> int:
        """Choose the largest of the later half."""
        return max(range(len(self.programs) // 2, len(self.programs)), key=lambda i: self.programs[i])

    def _watch(self, kernel: Any) -> None:
        run = kernel.run

        def watched(*args: Any, grid: tuple[int, ...], **kwargs: Any) -> Any:
            self.before.get(len(self.programs), lambda: None)()
            self.programs.append(math.prod(grid))
            return run(*args, grid=grid, **kwargs)

        kernel.run = watched


@contextmanager
def profiled(device: torch.device, launches: Launches) -> Iterator[None]:
    """Switch a profiler on before the chosen one of as many launches as there were, and off at the end."""
    if device.type != "cuda" or not launches.programs:
        yield
        return
    torch.cuda.synchronize()
    runtime: Any = torch.cuda.cudart()
    launches.before = {launches.chosen: runtime.cudaProfilerStart}
    launches.programs = []
    yield
    torch.cuda.synchronize()
    runtime.cudaProfilerStop()


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("operator", choices=list(KERNELS))
    parser.add_argument("--seq-len", type=int, help="tokens; default: 128K")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    sizes = SMOKE if arguments.smoke else M3
    seq_len = arguments.seq_len or (SMOKE_SEQ_LEN if arguments.smoke else SEQ_LEN)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return _refuse("--device=cuda: no GPU can be used here; use --device cpu --smoke")
    if seq_len < 0 or seq_len % sizes.block_size:
        return _refuse(f"--seq-len={seq_len}: must be a multiple of {sizes.block_size}, the block size")
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" and not arguments.smoke else torch.float32
    call = operator(arguments.operator, Tensors(device, dtype, arguments.seed), sizes, seq_len)
    call()
    launches = Launches(KERNELS[arguments.operator])
    call()
    programs = launches.programs
    start = time.perf_counter()
    with profiled(device, launches):
        call()
    seconds = time.perf_counter() - start
    line = f"{arguments.operator} of {seq_len} tokens: {seconds:.4g} s, "
    if programs:
        launches.programs = programs
        chosen, kernel = launches.chosen, KERNELS[arguments.operator]
        line += f"{kernel} {len(programs)} times, profiled: number {chosen + 1}"
    else:
        line += "in torch, without Triton"
    print(line)
    return 0


def _refuse(words: str) -> int:
    print(f"launch_once.py: error: {words}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
