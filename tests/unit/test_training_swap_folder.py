"""Folders of swap files: one for each process, none outlives its process, none is taken from a living one."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from msa_train.training.engines.deepspeed import swap_folder
from msa_train.training.engines.deepspeed.swap_folder import SwapFolder

HOLD = """
import sys, time
from msa_train.training.engines.deepspeed.swap_folder import SwapFolder
folder = SwapFolder(sys.argv[1])
(folder.path / "old.swp").write_text("numbers of a run that was killed")
print(folder.path, flush=True)
if sys.argv[2] == "wait":
    time.sleep(600)
"""


def test_two_ranks_of_a_node_have_two_folders(tmp_path: Path) -> None:
    first, second = SwapFolder(tmp_path), SwapFolder(tmp_path)
    assert first.path != second.path
    assert {first.path, second.path} == set(tmp_path.iterdir())
    first.remove()
    second.remove()
    assert not list(tmp_path.iterdir())


def test_ranks_that_start_at_once_take_no_folder_from_each_other(tmp_path: Path) -> None:
    """Locks are of open files, so threads stand for processes."""
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: SwapFolder(tmp_path), range(200)))
    assert {folder.path for folder in folders} == set(tmp_path.iterdir())
    assert len({folder.path for folder in folders}) == 200
    for folder in folders:
        assert (folder.path / "lock").exists()
        folder.remove()


def test_what_a_killed_process_left_is_taken_away_and_never_read(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), "wait"], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        ours = SwapFolder(tmp_path)
        assert (theirs / "old.swp").exists(), "it lives, so its files stay"
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert theirs.exists()
    next_one = SwapFolder(tmp_path)
    assert not theirs.exists()
    assert ours.path.exists()
    assert [path.name for path in next_one.path.iterdir()] == ["lock"]
    ours.remove()
    next_one.remove()


def test_a_process_that_ends_takes_its_folder_away(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLD, str(tmp_path), "end"], capture_output=True, text=True, check=True
    )
    assert str(tmp_path) in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_forked_child_leaves_its_parents_folder(tmp_path: Path) -> None:
    folder = SwapFolder(tmp_path)
    child = os.fork()
    if not child:
        folder.remove()
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.path.is_dir()
    folder.remove()


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "zero_stage_3").mkdir()
    (tmp_path / "msa_train-mine").mkdir()
    folder = SwapFolder(tmp_path)
    folder.remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["msa_train-mine", "zero_stage_3"]


def test_memory_in_files_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap_folder, "_LEAST_BYTES", 4096)
    folder = SwapFolder(tmp_path)
    made = folder.empty(5000, torch.bfloat16)
    made.fill_(3.0)
    assert [path.name for path in folder.path.iterdir()] == ["lock"]
    folder.remove()
    assert made.sum() == 15000


def test_a_full_disk_is_an_error_when_memory_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no signal when it is written."""

    def full(handle: int, offset: int, count: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(swap_folder.os, "posix_fallocate", full)
    folder = SwapFolder(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        folder.empty(2**20, torch.bfloat16)
    assert [path.name for path in folder.path.iterdir()] == ["lock"]
    folder.remove()
