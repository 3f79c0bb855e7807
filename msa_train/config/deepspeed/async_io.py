"""Find DeepSpeed's library for offload to NVMe, which is compiled at its first use, and what that needs.

No import of torch or DeepSpeed, which take seconds.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

_NAME = "async_io"


def async_io_file() -> Path:
    """Return where the library is, or will be once it is compiled.

    A DeepSpeed that was installed with DS_BUILD_AIO=1 has it in its package; else it is where torch compiles
    extensions, by the variable TORCH_EXTENSIONS_DIR or in the home.
    """
    package = find_spec("deepspeed")
    places = package.submodule_search_locations if package is not None else None
    for place in places or ():
        for found in sorted(Path(place, "ops", "aio").glob(f"{_NAME}_op*.so")):
            return found
    return _extensions() / _NAME / f"{_NAME}.so"


def _extensions() -> Path:
    """Return the folder of torch's compiled extensions, as torch.utils.cpp_extension names it."""
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if chosen:
        return Path(chosen)
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torch_extensions"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return root / f"{python}_{_accelerator()}"


def _accelerator() -> str:
    """Name what torch was built for, from its version file: cpu, cu128 or rocm6.4.43482."""
    package = find_spec("torch")
    if package is None or package.origin is None:
        return "cpu"
    values: dict[str, str] = {}
    for line in Path(package.origin).with_name("version.py").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition("=")
        values[name.partition(":")[0].strip()] = value.strip().strip("'\"")
    for name, prefix in (("hip", "rocm"), ("cuda", "cu")):
        if values.get(name, "None") != "None":
            return prefix + values[name].replace(".", "")
    return "cpu"
