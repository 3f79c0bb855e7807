"""Compiles the device, once for a Python and a torch: `python -m tests.helpers.pretended_gpu.build`.

In a process of its own: what loads the device has GPUs from then on.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

_SOURCE = Path(__file__).with_name("device.cpp")
_NAME = "pretended_gpu"
# -O1 takes half the time of -O2 to compile, and the work is done by torch's own kernels
_FLAGS = ["-O1", "-DUSE_C10D_GLOO"]


def _why_not() -> str:
    """What is missing to compile it; empty where nothing is."""
    if torch.version.cuda is not None:
        return "this torch has a CUDA device of its own"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python.h is missing"
    compiler = os.environ.get("CXX", "c++")
    missing = [name for name in (compiler, "ninja") if shutil.which(name) is None]
    return f"{' and '.join(missing)}: not found" if missing else ""


needs_pretended_gpu = pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "it can be compiled")


def folder() -> Path:
    """Where it is built: another one for every source, Python and torch."""
    sources = [path.read_text() for path in sorted(_SOURCE.parent.glob("*.[hc]*"))]
    facts = (sources, sys.version, torch.__version__, torch.__file__, _FLAGS)
    name = hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"{_NAME}_{os.getuid()}" / name


def is_built() -> bool:
    """Whether it has been compiled, and no other process is about to."""
    return (folder() / f"{_NAME}.so").exists() and not (folder() / "lock").exists()


@cache
def build() -> None:
    """Compile it, unless that was done: half a minute."""
    if not (folder() / f"{_NAME}.so").exists():
        subprocess.run([sys.executable, "-m", __name__], check=True, cwd=Path(__file__).parents[3])


@cache
def load_device() -> ModuleType:
    """The compiled device, in this process."""
    spec = importlib.util.spec_from_file_location(_NAME, folder() / f"{_NAME}.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Compile; of several processes that begin together one does it and the others wait."""
    from torch.utils.cpp_extension import load

    folder().mkdir(parents=True, exist_ok=True)
    load(_NAME, [str(_SOURCE)], extra_cflags=_FLAGS, build_directory=str(folder()))


if __name__ == "__main__":
    main()
