"""The kernels' own package and msa-train ask for the same things, and the kernels import nothing else."""

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_both_packages_ask_for_the_same() -> None:
    kernels, whole = project(ROOT / "kernels"), project(ROOT)
    assert set(kernels["dependencies"]) <= set(whole["dependencies"])
    assert kernels["optional-dependencies"]["triton"] == whole["optional-dependencies"]["kernels"]
    for key in ("version", "requires-python"):
        assert kernels[key] == whole[key]


def test_importing_them_imports_no_trainer() -> None:
    code = "import sys, msa_kernels; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    environment = {"PYTHONPATH": str(ROOT / "kernels"), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "msa_kernels" in loaded
    assert not loaded & {"msa_train", "launchers", "megatron", "hydra", "triton"}
