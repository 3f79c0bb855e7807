"""Workers run the launcher's code, whatever lies in the folder in which it was called."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launchers.local.code_path import search_path, worker_arguments

ROOT = Path(__file__).parents[2]


def test_workers_import_what_the_launcher_would(tmp_path: Path) -> None:
    for name in ("random.py", "json.py", "launchers.py"):
        (tmp_path / name).write_text("raise SystemExit('a file of the current folder was run')\n")
    (tmp_path / "code" / "launchers").mkdir(parents=True)
    (tmp_path / "code" / "launchers" / "__init__.py").touch()
    told = "import sys; main = lambda: print(sys.argv[1:], sys.flags.safe_path, sys.path)"
    (tmp_path / "code" / "launchers" / "worker.py").write_text(told)
    arguments = list(worker_arguments("run $dir/config.yaml", "module:function"))
    arguments[3] = json.dumps([str(tmp_path / "code"), *json.loads(arguments[3])])
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, env={}, timeout=60
    )
    assert done.stdout.startswith("['run $dir/config.yaml', 'module:function'] True ["), done
    assert str(tmp_path) + "'" not in done.stdout


def test_relative_entries_are_fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", "lib", "/abs"])
    assert search_path() == [str(tmp_path), f"{tmp_path}/lib", "/abs"]


def test_a_removed_folder_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    os.rmdir(tmp_path / "gone")
    monkeypatch.setattr(sys, "path", ["", "lib", "/abs"])
    assert search_path() == ["/abs"]
