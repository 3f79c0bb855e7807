"""Processes forked from a server that has imported once what takes seconds: torch, Megatron, Hydra.

The server has no process group, no thread pool at work and no CUDA context to inherit. Each process of pytest
has one of its own.
"""

import multiprocessing
import os
from typing import Any

import torch


def context() -> Any:
    """Of multiprocessing."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.helpers.preloaded"])
    return found


def is_usable() -> bool:
    """Where there are GPUs, asking for them may already have made forks unfit for CUDA."""
    return not torch.cuda.is_available()


def take_over(environment: dict[str, str]) -> None:
    """Give this process, a fork, the environment that it would have been started with."""
    os.environ.clear()
    os.environ.update(environment)
