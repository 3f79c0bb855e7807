"""What the kernels compile to stays as good as the table says that is kept with the results."""

import json
from importlib.metadata import version

from benchmarks.gpu.compiled import launch_all, rows_of
from benchmarks.machine import ROOT
from tests.helpers.triton_env import compiled_kernels, needs_triton

# instructions of a step: a compiler's release of the same number may still differ by its build
ALLOWED_INSTRUCTIONS = 1.02
RECORDED = json.loads((ROOT / "benchmarks" / "results" / "compiled.json").read_text())


@needs_triton
def test_kernels_compile_as_recorded() -> None:
    """Whatever the compiler: as many programs at a time, and no value outside of registers."""
    found = rows_of(compiled_kernels(launch_all))
    recorded = RECORDED["kernels"]
    assert found.keys() == recorded.keys(), "run `python -m benchmarks.gpu.compiled` and keep its results"
    worse = []
    for name, row in found.items():
        old = recorded[name]
        if row["spilled_bytes"] > old["spilled_bytes"] or row["programs"] < old["programs"]:
            worse.append((name, row, old))
        same = version("triton") == RECORDED["triton"]
        if same and row["instructions"] > ALLOWED_INSTRUCTIONS * old["instructions"]:
            worse.append((name, row, old))
    assert worse == []
