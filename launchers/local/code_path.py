"""Tell other processes where to find the code: what this one runs, never what lies in the current folder.

`python -m` and `python -c` put the current folder first: that may be another checkout, or hold a random.py.
"""

import importlib.util
import json
import os
import sys
import sysconfig
from pathlib import Path

_PACKAGES = ("launchers", "msa_train", "msa_kernels")
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from launchers.worker import main; main()"
)


def worker_arguments(*arguments: str) -> tuple[str, ...]:
    """Build the arguments of Python for `launchers.worker`, with this process's path in this order.

    -P keeps the current folder out of the worker's path, also while json is imported, and out of that of the
    Pythons that multiprocessing starts. The path goes as an argument: PYTHONPATH would not keep its order.

    Example: "config.yaml" -> ("-P", "-c", "import json, ...", '["/venv/lib/..."]', "config.yaml").
    """
    return ("-P", "-c", _START, json.dumps(search_path()), *arguments)


def search_path() -> list[str]:
    """Copy sys.path, with relative entries made absolute: a worker may have another current folder."""
    try:
        here = os.getcwd()
    except FileNotFoundError:
        # it was removed: nothing can be imported from there
        return [folder for folder in sys.path if os.path.isabs(folder)]
    return [os.path.join(here, folder) if folder else here for folder in sys.path]


def python_path(given: str, *, with_code: bool = True) -> str:
    """Build PYTHONPATH for a job: this code's folders, then the given value without the empty parts.

    An empty part, as `PYTHONPATH=$PYTHONPATH:/x` easily has, is the current folder to Python.

    Args:
        given: PYTHONPATH of this process.
        with_code: name this code's folders; False where the job has an installation of its own.

    Example: ":/x:", with_code=False -> "/x".
    """
    return os.pathsep.join([*(code_folders() if with_code else []), *filter(None, given.split(os.pathsep))])


def code_folders() -> list[str]:
    """List the folders that PYTHONPATH must name for `python -P` to find this code: none where installed."""
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    folders = []
    for name in _PACKAGES:
        # as the import system finds it: the three may come from different folders
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"{name} is imported here"
        assert spec.submodule_search_locations, f"{name} is a package"
        folder = Path(next(iter(spec.submodule_search_locations))).resolve().parent
        if folder not in installed:
            folders.append(str(folder))
    return list(dict.fromkeys(folders))
