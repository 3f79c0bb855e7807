"""Set before torch is imported anywhere, and inherited by every process that a test starts."""

import gc
import os
from pathlib import Path

import pytest

# Megatron compiles small functions on their first call: seconds of C++ compilation that help nothing here.
# The launcher sets the same for workers on the CPU.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# OpenMP's threads wait without sleeping, which takes the processors from what runs beside: the kernels' tests
# took three times the CPU time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
GPU_TESTS = Path(__file__).with_name("gpu")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu` open no other files: they import packages that a machine with GPUs may lack."""
    if config.getoption("markexpr") != "gpu" or collection_path == Path(__file__).parent:
        return None
    return None if collection_path.is_relative_to(GPU_TESTS) else True


def pytest_sessionstart() -> None:
    """What is imported does not become garbage: the collector need not look for any before tests run."""
    gc.disable()


def pytest_collection_finish() -> None:
    """From here on the collector works, on what tests make."""
    gc.freeze()
    gc.enable()
