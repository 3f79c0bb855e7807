"""Where the ranks of a test compute: what it chooses, or else what the variable MSA_TEST_DEVICE says.

cpu, where nothing is said; cuda: a GPU for each rank, joined by NCCL; pretended: the CPU in their place, see
`pretended_gpu`. So `MSA_TEST_DEVICE=cuda pytest tests/distributed/test_exactness.py` is the check of a
machine with GPUs.
"""

import os

import torch
from msa_kernels import dispatch

CHOICES = ("cpu", "cuda", "pretended")
VARIABLE = "MSA_TEST_DEVICE"


def chosen() -> str:
    """What the variable says."""
    name = os.environ.get(VARIABLE, "cpu")
    if name not in CHOICES:
        raise ValueError(f"{VARIABLE}={name}: must be one of {', '.join(CHOICES)}")
    return name


def prepare_rank(rank: int) -> None:
    """Call first in every rank; its device is the current one from then on."""
    name = chosen()
    if name == "pretended":
        from tests.helpers.pretended_gpu.install import install

        install()
        if os.environ.get("TRITON_INTERPRET") != "1":
            # nothing can be launched there: attention.kernel=auto is then the path in torch
            dispatch.has_triton = lambda: False
    if name != "cpu":
        torch.cuda.set_device(rank)


def rank_device() -> torch.device:
    """The device of this rank, after `prepare_rank`."""
    return torch.device("cpu") if chosen() == "cpu" else torch.device("cuda", torch.cuda.current_device())


def backend() -> str:
    """Of the ranks' process groups."""
    return "gloo" if chosen() == "cpu" else "nccl"
