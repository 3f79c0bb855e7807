"""Checkpoints whose files or manifest lead elsewhere, or say what cannot be: skipped, named, no waiting."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from msa_train.training.checkpoint_files import META_NAME, file_entry, read_manifest, write_json
from msa_train.training.checkpoint_store import check_resume, find_checkpoint, verify_folder
from tests.unit.test_training_checkpoint_store import SHARD, config_of, save

PASSWORDS = "../../../../../../../../../../etc/passwd"


def change_manifest(folder: Path, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    files = read_manifest(folder)
    change(files)
    write_json(folder / "manifest.json", {"files": files})


def sign(folder: Path, **changes: object) -> None:
    """Change meta.json, and the manifest with it."""
    meta = json.loads((folder / META_NAME).read_text()) | changes
    write_json(folder / META_NAME, meta)
    change_manifest(folder, lambda files: files.update({META_NAME: file_entry(folder / META_NAME)}))


def in_place(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def listed(name: str) -> Callable[[Path], None]:
    entry = {"size": 0, "crc32": "00000000"}
    return lambda folder: change_manifest(folder, lambda files: files.update({name: entry}))


def unlisted(folder: Path) -> None:
    change_manifest(folder, lambda files: files.pop(SHARD))


def unlisted_place(folder: Path) -> None:
    """The list of tensors names a file that no checksum speaks for."""
    place = _StorageInfo(relative_path="other", offset=0, length=1)
    data: dict[object, object] = {MetadataIndex("w"): place}
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data=data)))
    change_manifest(folder, lambda files: files.update({".metadata": file_entry(folder / ".metadata")}))


def backend(content: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "metadata.json"
        path.write_text(content)
        change_manifest(folder, lambda files: files.update({path.name: file_entry(path)}))

    return damage


def entry_is(value: object) -> Callable[[Path], None]:
    return lambda folder: change_manifest(folder, lambda files: files["common.pt"].update(size=value))


NOT_JSON, NO_NAME = "manifest.json: is not JSON", "which is no name in the folder"
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (in_place(SHARD, os.mkfifo), f"model file {SHARD}: is a pipe, not a regular file"),
    "pipe_manifest": (
        in_place("manifest.json", os.mkfifo),
        "manifest.json: is a pipe, not a regular file",
    ),
    "pipe_meta": (in_place(META_NAME, os.mkfifo), "meta.json: is a pipe, not a regular file"),
    "folder": (in_place("common.pt", Path.mkdir), "file common.pt: Is a directory"),
    "device": (
        in_place("common.pt", lambda path: path.symlink_to("/dev/zero")),
        "file common.pt: is a link out of the checkpoint; copy the file there",
    ),
    "link_to_nothing": (in_place(SHARD, lambda path: path.symlink_to("x")), f"model file {SHARD}: missing"),
    "link_in_a_circle": (
        in_place("manifest.json", lambda path: path.symlink_to(path.name)),
        "manifest.json: Too many levels of symbolic links",
    ),
    "link_to_older": (
        in_place(SHARD, lambda path: path.symlink_to(f"../step_00000100/{SHARD}")),
        f"model file {SHARD}: is a link out of the checkpoint; copy the file there",
    ),
    "name_up": (listed(PASSWORDS), f"manifest.json: lists '{PASSWORDS}', {NO_NAME}"),
    "name_absolute": (listed("/dev/zero"), f"manifest.json: lists '/dev/zero', {NO_NAME}"),
    "name_nul": (listed("a\0b"), f"manifest.json: lists 'a?b', {NO_NAME}"),
    "name_of_the_folder": (listed("."), f"manifest.json: lists '.', {NO_NAME}"),
    "name_empty": (listed(""), f"manifest.json: lists '', {NO_NAME}"),
    "unlisted": (unlisted, f"manifest.json: does not list {SHARD}"),
    "unlisted_place": (unlisted_place, "manifest.json: does not list other"),
    "size_of_text": (entry_is("6"), "manifest.json: lists no sizes and checksums"),
    "size_negative": (entry_is(-1), "manifest.json: lists no sizes and checksums"),
    "no_backend": (backend(""), "metadata.json: is not JSON"),
    "other_backend": (backend("{}"), "metadata.json: is of another form than torch_dist"),
    "deep": (lambda folder: (folder / "manifest.json").write_text("[" * 100_000), NOT_JSON),
    "folder_is_a_file": (
        lambda folder: (shutil.rmtree(folder), folder.write_text("")),
        "step_00000200: is no folder",
    ),
    "folder_is_a_link_to_nothing": (
        lambda folder: (shutil.rmtree(folder), folder.symlink_to("x")),
        "step_00000200: is no folder",
    ),
    "updates": (
        lambda folder: sign(folder, optimizer_updates=-1),
        "meta.json: the counts of steps, updates and samples are damaged",
    ),
    "version": (lambda folder: sign(folder, format_version=0), "meta.json: has no format_version"),
    "schedule": (lambda folder: sign(folder, schedule={}), "meta.json: schedule is damaged"),
    "stages": (lambda folder: sign(folder, stages=[{}]), "meta.json: stages is damaged"),
    "tokens": (lambda folder: sign(folder, tokens=-1), "meta.json: tokens is damaged"),
    "layout": (lambda folder: sign(folder, layout={"cp_size": -1}), "meta.json: layout is damaged"),
    "losses": (
        lambda folder: sign(folder, bad_steps={"recent_losses": ["x"]}),
        "meta.json: bad_steps is damaged",
    ),
    "optimizer": (lambda folder: sign(folder, optimizer="\x1b[2J"), "meta.json: optimizer is damaged"),
}


@pytest.mark.parametrize("kind", CASES)
def test_what_leads_elsewhere_or_cannot_be_is_skipped(tmp_path: Path, kind: str) -> None:
    damage, reason = CASES[kind]
    config = config_of(tmp_path)
    folder = save(config, 100, 200).path(200)
    damage(folder)
    for full in (False, True):
        assert verify_folder(folder, full=full) == reason
        found = find_checkpoint(config, full=full)
        assert found is not None
        assert found.step == 100
    told = f"checkpoint step_200 is damaged ({reason}) and is skipped; going on from step 100"
    assert check_resume(config) == [told]


def test_checkpoint_folder_may_be_a_link(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run")
    store = save(config, 100)
    store.path(100).rename(tmp_path / "elsewhere")
    store.path(100).symlink_to(tmp_path / "elsewhere")
    assert store.verify(100) is None
