"""Make one measurement in a process of its own; `run.py` starts it and reads the JSON that it prints."""

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.cpu_kernels.core import dense_attention, make_inputs, msa_core
from benchmarks.cpu_kernels.shape import CoreShape

# Tokens of the run that does not count: threads start, libraries load their code
_WARM_UP_TOKENS = 1024


def main() -> None:
    """Measure as the argument says and print a line of JSON.

    The argument is JSON with `what` ("check", "msa", "dense"), `seq_len`, `shape`, `threads`, `dense_heads`.
    """
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    shape = CoreShape(**request["shape"])
    if request["what"] == "check":
        print(json.dumps({"worst_row": check(shape)}))
        return
    step = _step(request["what"], shape, request["dense_heads"])
    step(_WARM_UP_TOKENS)
    before = _peak_bytes()
    timed = step(request["seq_len"])
    print(json.dumps(timed | {"peak_bytes": _peak_bytes(), "process_bytes": before}))


def check(shape: CoreShape) -> float:
    """Find the worst row of out, dq, dk and dv where MSA selects everything, against torch's."""
    inputs = make_inputs(shape, shape.block_size * shape.topk)
    msa = msa_core(shape, inputs)
    dense = dense_attention(inputs, shape.num_heads)
    return max(_worst_row(a, b) for a, b in zip((msa.out, msa.dq, msa.dk, msa.dv), dense, strict=True))


def _worst_row(got: Tensor, want: Tensor) -> float:
    """Find the largest error of a row over the largest row: the first dq is 0 but for rounding."""
    return float((got - want).norm(dim=-1).max() / want.norm(dim=-1).max())


def _step(what: str, shape: CoreShape, dense_heads: int) -> Callable[[int], dict[str, float]]:
    """Make inputs of a length and run forward and backward on them once, timed."""

    def step(seq_len: int) -> dict[str, float]:
        inputs = make_inputs(shape, seq_len)
        wall, cpu, busy = time.perf_counter(), time.process_time(), _busy_s()
        result: Any = msa_core(shape, inputs) if what == "msa" else dense_attention(inputs, dense_heads)
        wall, cpu, busy = time.perf_counter() - wall, time.process_time() - cpu, _busy_s() - busy
        del result
        others = max(0.0, busy - cpu) / (wall * psutil.cpu_count())
        return {"seconds": wall, "cpu_s": cpu, "others_share": others}

    return step


def _busy_s() -> float:
    """Read the CPU seconds of everything that runs here, and of what the machine's host gave to others."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice


def _peak_bytes() -> int:
    """Read the most memory that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
