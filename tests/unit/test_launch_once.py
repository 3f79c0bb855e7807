"""One warm launch for a profiler: which of a kernel's launches it begins with, and the command."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import launch_once
from benchmarks.gpu.launch_once import Launches, profiled

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("operator", list(launch_once.KERNELS))
def test_tiny_run(operator: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch_once.main([operator, "--smoke", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith(f"{operator} of 64 tokens: ")


def test_as_a_command_from_anywhere(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "benchmarks/gpu/launch_once.py"), "scoring"]
    done = subprocess.run(
        [*command, "--smoke", "--device", "cpu", "--seq-len", "100"],
        cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "launch_once.py: error: --seq-len=100: must be a multiple of 16, the block size\n"


def test_profiles_the_largest_late_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []
    kernel = SimpleNamespace(run=lambda *args, grid: launched.append(args))
    module: Any = ModuleType("msa_kernels.stand_in")
    module.stand_in_kernel = kernel
    monkeypatch.setitem(sys.modules, "msa_kernels.stand_in", module)
    runtime = SimpleNamespace(
        cudaProfilerStart=lambda: launched.append("on"), cudaProfilerStop=lambda: launched.append("off")
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)

    def call() -> None:
        for number, programs in enumerate([9, 1, 7, 2, 8, 3]):
            kernel.run(number, grid=(programs,))

    launches = Launches("stand_in_kernel")
    call()
    launched.clear()
    with profiled(torch.device("cuda"), launches):
        call()
    assert launched == [(0,), (1,), (2,), (3,), "on", (4,), (5,), "off"]
