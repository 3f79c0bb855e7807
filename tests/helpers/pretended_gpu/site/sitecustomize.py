"""Gives every Python process that finds this folder in PYTHONPATH as many pretended GPUs
as MSA_PRETEND_GPU says.

    MSA_PRETEND_GPU=1 PYTHONPATH=$PWD/tests/helpers/pretended_gpu/site:$PWD:$PWD/kernels python ...

1 to 8; CUDA_VISIBLE_DEVICES may leave fewer. Python reads this file when it starts, and the device comes with
the first import of torch: a process that never imports it pays nothing. Where the device has not been
compiled there is no GPU, and a line on stderr says so; `python -m tests.helpers.pretended_gpu.run COMMAND`
compiles it first and sets all variables.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

_VARIABLE = "MSA_PRETEND_GPU"
_FOLDER = Path(__file__).resolve().parents[1]
_ROOT = str(_FOLDER.parents[2])


class _Hook(MetaPathFinder):
    """Calls something as soon as a module has been imported."""

    def __init__(self, calls: dict[str, Callable[[ModuleType], None]]) -> None:
        self._calls = calls

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders say, for modules that are waited for; None for all others."""
        if fullname not in self._calls:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            call = self._calls.pop(fullname, None)
            if call is not None:
                call(module)

        loader.exec_module = exec_module
        return spec


def _visible() -> int:
    """GPUs of this process."""
    wanted = os.environ.get(_VARIABLE, "0")
    if not wanted.isdigit() or int(wanted) > 8:
        raise ValueError(f"{_VARIABLE}={wanted}: must be a number of GPUs, 0 to 8")
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return int(wanted)
    return min(int(wanted), len([name for name in listed.split(",") if name.strip() not in ("", "-1")]))


def _pretend(_torch: ModuleType) -> None:
    # of this checkout, whatever else is called tests
    sys.path.insert(0, _ROOT)
    try:
        from tests.helpers.pretended_gpu.build import is_built
        from tests.helpers.pretended_gpu.install import install
    finally:
        sys.path.remove(_ROOT)
    if is_built():
        install(_visible())
    else:
        print(f"{_VARIABLE}: the device is not compiled, so there is no GPU", file=sys.stderr)


def _hide_triton(dispatch: Any) -> None:
    # nothing can be launched there
    if os.environ.get("TRITON_INTERPRET") != "1":
        dispatch.has_triton = lambda: False


if _visible():
    # Megatron would compile functions for a GPU
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # what looks for a GPU before it imports torch asks for nvidia-smi
    programs = str(_FOLDER / "bin")
    if programs not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", os.defpath)])
    sys.meta_path.insert(0, _Hook({"torch": _pretend, "msa_kernels.dispatch": _hide_triton}))
