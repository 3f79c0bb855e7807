"""Make runs on GPUs repeat bit by bit: fixed orders of sums in place of atomic ones.

On CPUs nothing is to be done: every sum of a step has one order there.

What differs from run to run on GPUs otherwise, and what this does about it:

- sums of rows by index (`index_add`, gradients of `index_select`, `gather` and indexing, `scatter_add`) are
  atomic: torch sorts the indices first, which costs a sort and a pass over the rows each time;
- cuBLAS takes workspaces, and with them splits of a product, by what other streams do: it gets its own;
- NCCL may let the switches add (NVLS), in no fixed order: it is told not to, and adds by rings and trees;
- compiled functions may be tuned by measuring, and sums then cut another way: they are not;
- torch has operators without a fixed order at all: they raise an error instead. No step has one.

Our Triton kernels add nothing atomically. Restarts on other GPUs, other numbers of them or other versions of
libraries give other bits, as before. Cost on GPUs: not measured. Python time: none in a step.
"""

import os

import torch
import torch.utils.deterministic

_VARIABLES = {
    # two buffers of 4 MiB per stream, of the two sizes that cuBLAS documents for this
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "^NVLS",
    # Transformer Engine's attention and norms
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}


def choose_deterministic() -> None:
    """Choose fixed orders of sums for the rest of this process; before the first use of CUDA and NCCL.

    Variables that the user has set stay.
    """
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True)
    # No memory is read here before it is written, and filling it costs a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[assignment]
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
