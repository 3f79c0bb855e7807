"""Files are written in folders of others without following links, and appear whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from launchers.node_check import _name
from launchers.run_dir import check_writable, claim_run_dir, write_config
from msa_train.config import RunConfig
from msa_train.files import new_file, open_to_append, remove_partials
from msa_train.simulate.selections import SelectionRecorder
from msa_train.training.bad_steps import EventLog
from msa_train.training.checkpoint_files import write_json
from msa_train.training.checkpoint_store import CheckpointStore
from msa_train.training.generation import VARIABLE, take_over
from msa_train.training.metrics import MetricsWriter
from msa_train.training.stop import Stopped, write_stopped
from msa_train.training.summary import write_summary

OWN = "the user's own file\n"


def write_metrics(folder: Path) -> None:
    writer = MetricsWriter(folder, tensorboard=False, resume_step=0)
    writer.write(1, {"lm_loss": 1.0})
    writer.close()


def save_selections(folder: Path) -> None:
    recorder = SelectionRecorder(
        seq_len=16, block_size=4, num_kv_heads=1, topk=1, first_token=0, num_tokens=16, chunk_tokens=4,
        cu_seqlens=[0, 16],
    )  # fmt: skip
    recorder.add(1, np.zeros((16, 1, 1), np.int64))
    recorder.save(folder / "part.npz", "test")


# what is written, by the name under which it appears
WRITERS: dict[str, Callable[[Path], object]] = {
    ".lock": lambda folder: claim_run_dir(str(folder)).close(),
    "config.yaml": lambda folder: write_config(RunConfig(run_dir=str(folder))),
    ".generation": lambda folder: take_over(folder, "7.0"),
    "stopped.json": lambda folder: write_stopped(
        folder, Stopped(step=1, signal="SIGTERM", saved=True, generation="")
    ),
    "summary.json": lambda folder: write_summary(folder, {"steps": 1}),
    "meta.json": lambda folder: write_json(folder / "meta.json", {}),
    "metrics.jsonl": write_metrics,
    "bad_steps.jsonl": lambda folder: EventLog(folder).write({"event": "skip"}),
    "slurm/bad_nodes": lambda folder: _name(folder, ["node1: broken"]),
    "part.npz": save_selections,
    "checkpoints/latest": lambda folder: CheckpointStore(folder)._point_latest(folder),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("exists", [True, False], ids=["file", "nothing"])
def test_links_are_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, exists: bool
) -> None:
    monkeypatch.setenv(VARIABLE, "")
    own, run_dir = tmp_path / "own", tmp_path / "run"
    if exists:
        own.write_text(OWN)
    path = run_dir / name
    path.parent.mkdir(parents=True)
    # the name itself, and what its parts were called in earlier versions
    for link in (path, path.with_name(f".{path.name}.partial"), path.with_name(".generation.7.0.partial")):
        link.symlink_to(own)
    try:
        WRITERS[name](run_dir)
    except (OSError, ValueError) as error:
        assert "link" in str(error)  # noqa: PT017 (either is right)
    assert own.exists() == exists
    assert not exists or own.read_text() == OWN


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "bad_steps.jsonl"])
def test_links_that_would_be_appended_to_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("elsewhere")
    match = rf"^run_dir=\S+: {name} is a link to elsewhere, and .*; remove the link, or use another run_dir$"
    for check in (check_writable, claim_run_dir):
        with pytest.raises(ValueError, match=match):
            check(str(tmp_path))


def test_only_plain_files_are_appended_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a file; remove it"):
        open_to_append(tmp_path / "pipe")
    with open_to_append(tmp_path / "new") as file:
        file.write("a")
    with open_to_append(tmp_path / "new") as file:
        file.write("b")
        file.seek(0)
        assert file.read() == "ab"


def test_new_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def fail() -> None:
        with new_file(path) as file:
            file.write("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [one.name for one in tmp_path.iterdir()] == ["file"]
    with new_file(path, "wb") as file:
        file.write(b"after")
        assert path.read_text() == "before"
        # other processes can write the same at the same time
        (partial,) = (one.name for one in tmp_path.iterdir() if one != path)
    assert path.read_text() == "after"
    (tmp_path / partial).touch()
    (tmp_path / ".config.yaml.partial").touch()
    remove_partials(tmp_path)
    assert {one.name for one in tmp_path.iterdir()} == {"file", ".config.yaml.partial"}
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("target", ["nothing", "run"])
def test_run_dir_behind_a_link_to_nothing_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "run").symlink_to(target)
    for run_dir in (tmp_path / "run", tmp_path / "run/below"):
        for check in (check_writable, claim_run_dir):
            with pytest.raises(ValueError, match=rf"^run_dir={run_dir}: cannot be written \("):
                check(str(run_dir))
    assert not (tmp_path / "nothing").exists()
