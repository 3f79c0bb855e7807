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
    """Of a version that is not recorded: no worse than the newest that is, but for the instructions."""
    found = rows_of(compiled_kernels(launch_all))
    known = RECORDED.get(version("triton"))
    recorded = (known or max(RECORDED.items())[1])["kernels"]
    assert found.keys() == recorded.keys(), "run `python -m benchmarks.gpu.compiled` and keep its results"
    worse = []
    for name, row in found.items():
        old = recorded[name]
        if row["spilled_bytes"] > old["spilled_bytes"] or row["programs"] < old["programs"]:
            worse.append((name, row, old))
        if known and row["instructions"] > ALLOWED_INSTRUCTIONS * old["instructions"]:
            worse.append((name, row, old))
    assert worse == []
