"""Imports form no circle, files and folders stay small; the layers are contracts of import-linter."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (ROOT / "msa_train", ROOT / "launchers", ROOT / "kernels" / "msa_kernels")


def imports_of(path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of ours that a file imports when it is imported itself, not later inside a function."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in modules else node.module for name in names} & modules.keys()
    return found


def test_no_circle() -> None:
    modules = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in package.rglob("*.py")
    }
    assert len(modules) > 250
    graph = {name: imports_of(path, modules) - {name} for name, path in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_sizes_of_files_and_packages(package: Path) -> None:
    """At most 400 lines in a file, 12 files in a folder: the right one is found by its name."""
    for folder in [package, *(path for path in package.rglob("*") if path.is_dir())]:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 12, f"{folder.relative_to(ROOT)} has {len(files)} files"
        for path in files:
            lines = len(path.read_text(encoding="utf-8").splitlines())
            assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines"
