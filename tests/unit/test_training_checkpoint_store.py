"""Checkpoint folders without any tensors in them: publishing, damage, choice."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from msa_train.checkpoint import store as checkpoint_store
from msa_train.checkpoint.compatibility import fingerprint
from msa_train.checkpoint.find import select_checkpoint
from msa_train.checkpoint.manifest import file_entry, verify_folder
from msa_train.checkpoint.store import CheckpointStore
from msa_train.config import AttentionConfig, CheckpointConfig, ModelConfig, RunConfig
from msa_train.runtime.atomic_files import write_json
from tests.helpers.resume_notes import resume_notes

SHARD = "__0_0.distcp"


def names(store: CheckpointStore) -> list[str]:
    """What is in the folder of all checkpoints."""
    return sorted(path.name for path in store.folder.iterdir())


def config_of(run_dir: Path, load: Path | str = "") -> RunConfig:
    return RunConfig(run_dir=str(run_dir), checkpoint=CheckpointConfig(load=str(load)))


def fill(folder: Path, step: int, config: RunConfig, **changes: object) -> None:
    (folder / SHARD).write_bytes(bytes(range(256)) * 10)
    (folder / "common.pt").write_bytes(b"common")
    meta = {
        "format_version": 1,
        "step": step,
        "consumed_samples": step,
        "msa_train_version": "0.1.0",
        "fingerprint": fingerprint(config),
        "layout": {},
        **changes,
    }
    write_json(folder / "meta.json", meta)
    files = {path.name: file_entry(path) for path in folder.iterdir()}
    write_json(folder / "manifest.json", {"files": files})


def save(config: RunConfig, *steps: int, **changes: object) -> CheckpointStore:
    store = CheckpointStore(config.run_dir)
    for step in steps:
        fill(store.begin(step), step, config, **changes)
        store.publish(step)
    return store


def truncate(folder: Path) -> None:
    os.truncate(folder / SHARD, 100)


def flip(folder: Path) -> None:
    content = bytearray((folder / SHARD).read_bytes())
    content[1000] ^= 1
    (folder / SHARD).write_bytes(content)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def overwrite(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def change_step(folder: Path) -> None:
    """A digit of meta.json flips: still JSON, still plausible."""
    text = (folder / "meta.json").read_text()
    (folder / "meta.json").write_text(text.replace('"step": 200', '"step": 300'))


STRUCTURE = {
    "truncated": (truncate, f"model file {SHARD}: 100 bytes instead of 2560"),
    "missing": (remove(SHARD), f"model file {SHARD}: missing"),
    "missing_common": (remove("common.pt"), "file common.pt: missing"),
    "no_manifest": (remove("manifest.json"), "manifest.json: missing"),
    "no_meta": (remove("meta.json"), "meta.json: missing"),
    "garbage_manifest": (overwrite("manifest.json", b"\xff\x00{"), "manifest.json: is not JSON"),
    "zeroed_manifest": (overwrite("manifest.json", bytes(100)), "manifest.json: is not JSON"),
    "empty_manifest": (overwrite("manifest.json", b"{}"), "manifest.json: lists no sizes and checksums"),
    "list_manifest": (overwrite("manifest.json", b"[]"), "manifest.json: is not a JSON object"),
    "changed_meta": (change_step, "meta.json: checksum"),
    "empty_folder": (empty, "manifest.json: missing"),
}


@pytest.mark.parametrize("kind", STRUCTURE)
def test_structural_damage_is_found_and_skipped(tmp_path: Path, kind: str) -> None:
    damage, reason = STRUCTURE[kind]
    config = config_of(tmp_path)
    store = save(config, 100, 200)
    assert store.verify(200) is None
    damage(store.path(200))
    assert store.verify(200, full=False) == reason
    assert store.verify(200) == reason
    assert store.steps() == [100, 200]
    found = select_checkpoint(config, full=False)
    assert found is not None
    assert (found.step, found.path, found.own) == (100, store.path(100), True)
    assert resume_notes(config) == [
        f"checkpoint step_200 is damaged ({reason}) and is skipped; going on from step 100"
    ]


def test_flipped_byte_is_found_by_the_full_check_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path)
    store = save(config, 100, 200)
    flip(store.path(200))
    assert store.verify(200, full=False) is None
    assert store.verify(200) == f"model file {SHARD}: checksum"
    cheap, full = select_checkpoint(config, full=False), select_checkpoint(config, full=True)
    assert cheap is not None
    assert full is not None
    assert (cheap.step, full.step) == (200, 100)
    known = select_checkpoint(config, full=False, known_damaged={store.path(200): "it is"})
    assert known is not None
    assert known.messages == ["checkpoint step_200 is damaged (it is) and is skipped; going on from step 100"]
    assert "checksum" in resume_notes(config)[0]
    monkeypatch.setattr("msa_train.checkpoint.find.FULL_CHECK_BYTES", 100)
    assert resume_notes(config) == []


def test_meta_with_sound_checksum_but_wrong_content(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    store = save(config, 100)
    fill(store.begin(200), 300, config)
    store.publish(200)
    assert store.verify(200) == "meta.json: is of step 300"
    fill(store.begin(300), 300, config, consumed_samples="many")
    store.publish(300)
    assert store.verify(300) == "meta.json: has no consumed_samples"


def test_several_damaged_ones_are_each_named(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    store = save(config, 100, 200, 300)
    truncate(store.path(300))
    flip(store.path(200))
    assert resume_notes(config) == [
        f"checkpoint step_300 is damaged (model file {SHARD}: 100 bytes instead of 2560) and is skipped",
        f"checkpoint step_200 is damaged (model file {SHARD}: checksum) and is skipped; "
        "going on from step 100",
    ]


def test_nothing_to_find(tmp_path: Path) -> None:
    assert select_checkpoint(config_of(tmp_path / "absent"), full=True) is None
    assert resume_notes(config_of(tmp_path)) == []
    (tmp_path / "checkpoints" / "notes").mkdir(parents=True)
    assert CheckpointStore(tmp_path).steps() == []


def test_all_damaged_is_an_error_with_a_fix(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    store = save(config, 100, 200)
    truncate(store.path(100))
    (store.path(200) / "manifest.json").unlink()
    with pytest.raises(ValueError, match="every checkpoint is damaged") as caught:
        resume_notes(config)
    text = str(caught.value)
    assert "\n" not in text
    assert "step_00000200: manifest.json: missing; step_00000100: model file" in text
    assert f"remove {store.folder} to start anew, or use another run_dir" in text


def test_another_model_is_refused_with_field_and_values(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    store = save(config, 100)
    other = replace(config, model=ModelConfig(hidden_size=256, num_layers=8))
    with pytest.raises(ValueError, match="another model") as caught:
        resume_notes(other)
    assert str(caught.value) == (
        f"model.num_layers=8: checkpoint {store.path(100)} is of another model, with model.num_layers=3; "
        "set model.num_layers=3, or use another run_dir"
    )


def test_refusal_comes_before_reading_all_files(tmp_path: Path) -> None:
    """A damaged checkpoint of another model is first of all one of another model."""
    config = config_of(tmp_path)
    flip(save(config, 100).path(100))
    with pytest.raises(ValueError, match=r"attention\.topk=4: checkpoint"):
        resume_notes(replace(config, attention=AttentionConfig(topk=4)))


def test_fields_without_say_in_the_weights_may_change(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    save(config, 100)
    same = ModelConfig(name="b", init_std=0.5, layer_attention="full,msa*1,msa", router_bias_update_rate=0)
    changed = replace(config, model=same, attention=AttentionConfig(kl_weight=0.5, window=7))
    changed.parallel.cp_size, changed.optim.lr = 8, 1.0
    found = select_checkpoint(changed, full=True)
    assert found is not None
    assert found.messages == []


def test_fingerprint_is_plain_json() -> None:
    content = fingerprint(RunConfig())
    assert json.loads(json.dumps(content)) == content
    assert content["model.layer_attention"] == "full*1,msa*2"
    assert content["model.activation"] == "swiglu_oai"
    assert "attention.block_size" in content


def test_newer_format_is_refused_not_skipped(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    save(config, 100)
    save(config, 200, format_version=9, msa_train_version="9.0", fingerprint=None, consumed_samples=None)
    with pytest.raises(ValueError, match="step_200 has format 9, written by msa-train 9") as caught:
        resume_notes(config)
    assert "upgrade msa-train, or use another run_dir" in str(caught.value)


def test_fields_of_older_and_newer_versions(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    older = {key: value for key, value in fingerprint(config).items() if key != "model.qk_norm"}
    save(config, 100, fingerprint=older)
    assert resume_notes(config) == []
    save(config, 200, fingerprint={**fingerprint(config), "model.new_thing": 3})
    with pytest.raises(ValueError, match=r"model.new_thing=3, which msa-train .* does not know"):
        resume_notes(config)


@pytest.mark.parametrize("form", ["run_dir", "checkpoints", "folder", "renamed"])
def test_load_from_another_run(tmp_path: Path, form: str) -> None:
    first = config_of(tmp_path / "first")
    store = save(first, 100, 200)
    renamed = tmp_path / "best"
    shutil.copytree(store.path(200), renamed)
    loads = {
        "run_dir": tmp_path / "first",
        "checkpoints": store.folder,
        "folder": store.path(100),
        "renamed": renamed,
    }
    found = select_checkpoint(config_of(tmp_path / "second", loads[form]), full=True)
    assert found is not None
    assert (found.step, found.own) == (100 if form == "folder" else 200, False)


def test_own_checkpoint_goes_before_load(tmp_path: Path) -> None:
    save(config_of(tmp_path / "first"), 100)
    config = config_of(tmp_path / "second", tmp_path / "does_not_exist")
    save(config, 10)
    found = select_checkpoint(config, full=True)
    assert found is not None
    assert (found.step, found.own) == (10, True)


def test_load_skips_damaged_ones_but_not_a_damaged_folder(tmp_path: Path) -> None:
    store = save(config_of(tmp_path / "first"), 100, 200)
    flip(store.path(200))
    config = config_of(tmp_path / "second", tmp_path / "first")
    assert resume_notes(config)[0].endswith("and is skipped; going on from step 100")
    config.checkpoint.load = str(store.path(200))
    with pytest.raises(ValueError, match=r"^checkpoint.load=.*use another checkpoint.load$"):
        resume_notes(config)


@pytest.mark.parametrize(("name", "state"), [("absent", "does not exist"), ("empty", "has no checkpoint")])
def test_load_that_leads_nowhere(tmp_path: Path, name: str, state: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=rf"^checkpoint.load=.*{name}: {state}; use the run_dir of a run"):
        resume_notes(config_of(tmp_path / "run", tmp_path / name))


def test_load_allows_what_a_context_extension_changes(tmp_path: Path) -> None:
    save(config_of(tmp_path / "first"), 100)
    config = config_of(tmp_path / "second", tmp_path / "first")
    config.model.rope_theta, config.attention.topk = 5e6, 32
    assert resume_notes(config) == [
        "model.rope_theta=5000000.0: the checkpoint was trained with 10.0",
        "attention.topk=32: the checkpoint was trained with 16",
    ]
    config.model.num_heads = 8
    with pytest.raises(ValueError, match=r"model\.num_heads=8: .*use another checkpoint\.load"):
        resume_notes(config)


def test_state_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run")
    save(config, 100, optimizer="muon")
    with pytest.raises(
        ValueError, match=r"^optim.algorithm=adamw: checkpoint step_100 has the state of muon; "
    ):
        resume_notes(config)
    other = config_of(tmp_path / "other", tmp_path / "run")
    with pytest.raises(ValueError, match="has the state of muon"):
        resume_notes(other)
    other.checkpoint.load_weights_only = True
    assert resume_notes(other) == []


def test_publish_replaces_a_damaged_checkpoint_of_the_same_step(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    store = save(config, 100, 200)
    truncate(store.path(200))
    store = save(config, 200)
    assert store.verify(200) is None
    assert names(store) == ["latest", "step_00000100", "step_00000200"]


def test_begin_removes_leftovers_and_abandon_its_own(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    store = save(config, 100)
    for name in (".step_00000200.partial", ".step_00000100.removed"):
        (store.folder / name / "inner").mkdir(parents=True)
    partial = store.begin(200)
    assert list(partial.iterdir()) == []
    assert names(store) == [partial.name, "latest", "step_00000100"]
    store.abandon(200)
    assert store.steps() == [100]
    assert not partial.exists()


def move_away(store: CheckpointStore, step: int, elsewhere: Path) -> Path:
    """As people do with a checkpoint for which a disk is too small: moved, and a link left in its place."""
    target = elsewhere / store.path(step).name
    target.parent.mkdir(exist_ok=True)
    shutil.move(store.path(step), target)
    store.path(step).symlink_to(target)
    return target


def test_a_checkpoint_that_is_a_link_is_removed_and_replaced_as_such(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run")
    store = save(config, 100, 200)
    moved = [move_away(store, step, tmp_path / "archive") for step in (100, 200)]
    assert store.steps() == [100, 200]
    assert [store.verify(step) for step in (100, 200)] == [None, None]
    truncate(moved[1])
    store = save(config, 200)
    assert store.verify(200) is None
    assert not store.path(200).is_symlink()
    assert store.prune(1) == [100]
    assert names(store) == ["latest", "step_00000200"]
    # what the links led to is another's to remove
    assert all((folder / "meta.json").is_file() for folder in moved)
    # a link that leads nowhere is none of the steps, and in nobody's way
    store.path(300).symlink_to(tmp_path / "gone")
    save(config, 300)
    assert store.verify(300) is None


def test_links_and_files_among_leftovers_are_removed(tmp_path: Path) -> None:
    store = save(config_of(tmp_path / "run"), 100)
    (tmp_path / "other").mkdir()
    (store.folder / ".step_00000100.removed").symlink_to(tmp_path / "other")
    (store.folder / ".step_00000200.partial").touch()
    assert store.clear() == []
    assert names(store) == ["latest", "step_00000100"]
    assert (tmp_path / "other").is_dir()


def test_leftovers_that_stay_are_told_once_and_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path)
    store = save(config, 100)
    busy = store.partial(200)
    (busy / "inner").mkdir(parents=True)
    remove_tree = shutil.rmtree

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if "200" in path.name and (path / "inner").exists():
            if not ignore_errors:
                raise OSError(errno.EBUSY, "Device or resource busy", str(path / "inner"))
            return
        remove_tree(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(checkpoint_store.shutil, "rmtree", refuse)
    (note,) = store.clear()
    assert (
        note == f"{busy} is left over and could not be removed (Device or resource busy); remove it by hand"
    )
    fill(store.make_partial(200), 200, config)
    store.publish(200)
    assert store.verify(200) is None
    assert store.clear() == []
    assert store.prune(1) == [100]
    (left,) = (name for name in names(store) if name not in ("latest", "step_00000200"))
    assert left.startswith(".step_")


def test_two_may_prune_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run and msa-checkpoint prune: what one finds gone, the other has removed."""
    store = save(config_of(tmp_path), 100, 200, 300, 400)
    remove_tree = shutil.rmtree

    def removed_meanwhile(path: Path, ignore_errors: bool = False) -> None:
        remove_tree(path, ignore_errors=True)
        if not ignore_errors:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))

    monkeypatch.setattr(checkpoint_store.shutil, "rmtree", removed_meanwhile)
    (store.folder / ".step_00000100.removed").mkdir()
    assert store.clear() == []
    steps = store.steps

    def seen_before_the_other(self: CheckpointStore) -> list[int]:
        found = steps()
        remove_tree(self.path(200), ignore_errors=True)
        return found

    monkeypatch.setattr(CheckpointStore, "steps", seen_before_the_other)
    assert store.prune(1) == [300, 200, 100]
    assert names(store) == ["latest", "step_00000400"]


@pytest.mark.parametrize("kept", [True, False], ids=["beside", "alone"])
def test_latest_that_a_copy_made_a_folder_is_a_link_again(tmp_path: Path, kept: bool) -> None:
    config = config_of(tmp_path)
    store = save(config, 100, 200)
    link = store.folder / "latest"
    link.unlink()
    shutil.copytree(store.path(200), link)
    if not kept:
        shutil.rmtree(store.path(200))
    save(config, 300)
    assert link.readlink() == Path("step_00000300")
    assert names(store) == ["latest", "step_00000100", "step_00000200", "step_00000300"]
    assert store.verify(200) is None


def test_names_with_a_dot_that_a_copy_left_out(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    folder = store.begin(100)
    (folder / ".metadata").touch()
    fill(folder, 100, config_of(tmp_path))
    (store.publish(100) / ".metadata").unlink()
    reason = store.verify(100) or ""
    assert reason == "file .metadata: missing; some tools leave out names with a dot when they copy"


def test_publish_needs_a_manifest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.begin(1)
    with pytest.raises(AssertionError, match="must be written before step 1"):
        store.publish(1)
    assert store.steps() == []


def test_prune_keeps_the_last_sound_ones(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    store = save(config, 100, 200, 300, 400)
    assert store.prune(0) == []
    truncate(store.path(300))
    assert store.prune(2) == [100]
    assert store.steps() == [200, 300, 400]
    assert store.prune(1) == [300, 200]
    assert names(store) == ["latest", "step_00000400"]


def test_prune_spares_every_so_many(tmp_path: Path) -> None:
    store = save(config_of(tmp_path), 100, 200, 300, 400, 500, 600)
    assert store.prune(2, 200, dry_run=True) == [300, 100]
    assert store.steps() == [100, 200, 300, 400, 500, 600]
    assert store.prune(2, 200) == [300, 100]
    assert store.prune(1, 400) == [500, 200]
    assert store.steps() == [400, 600]


def test_prune_spares_ends_of_stages(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    save(config, 100)
    save(config, 150, ends_stage=True)
    store = save(config, 200, 300, ends_stage=False)
    assert store.prune(1, dry_run=True) == [200, 100]
    assert store.prune(1) == [200, 100]
    assert store.prune(1, keep_stage_ends=False) == [150]
    assert store.steps() == [300]


def test_prune_keeps_one_from_before_bad_steps(tmp_path: Path) -> None:
    """A run that was stopped among bad steps may still go back to the checkpoint before them."""
    save(config_of(tmp_path), 100, 200)
    store = save(config_of(tmp_path), 230, bad_steps={"in_a_row": 2})
    assert store.prune(1) == [100]
    assert store.steps() == [200, 230]
    store = save(config_of(tmp_path), 300, bad_steps={"in_a_row": 0})
    assert store.prune(1) == [230, 200]


def test_latest_follows(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    store = save(config, 100, 200, 300)
    latest = store.folder / "latest"
    assert latest.readlink() == Path("step_00000300")
    fill(store.begin(400), 400, config)
    assert latest.readlink() == Path("step_00000300")
    assert verify_folder(latest, full=True) is None
    assert store.remove_after(100) == [300, 200]
    assert names(store)[1:] == ["latest", "step_00000100"]
    assert latest.readlink() == Path("step_00000100")


def test_space_is_asked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = save(config_of(tmp_path), 100)
    monkeypatch.setattr("msa_train.checkpoint.store.free_bytes", lambda _: 2 * 10**9)
    store.check_space(10**9)
    text = (
        f"it needs 3 GB and {store.folder} has 2 GB free, the checkpoint of step 100 stays; free some space"
    )
    with pytest.raises(OSError, match=f"^{re.escape(text)}"):
        store.check_space(3 * 10**9)


def test_prune_does_not_count_later_checkpoints_of_before_going_back(tmp_path: Path) -> None:
    """Step 400 is damaged in a way that only a full check sees; the run went back to 300 and wrote 350."""
    config = config_of(tmp_path)
    flip(save(config, 300, 400).path(400))
    store = save(config, 350)
    assert store.prune(1) == [300]
    assert store.steps() == [350, 400]


WRITER = """
import sys, time
from pathlib import Path
from tests.unit.test_training_checkpoint_store import config_of, fill
from msa_train.checkpoint.store import CheckpointStore

config = config_of(Path(sys.argv[1]))
store = CheckpointStore(config.run_dir)
fill(store.begin(200), 200, config)
print("written", flush=True)
time.sleep(60)
store.publish(200)
"""


def test_kill_between_begin_and_publish_leaves_the_previous_one(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    store = save(config, 100)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert store.partial(200).is_dir()
    assert store.steps() == [100]
    found = select_checkpoint(config, full=True)
    assert found is not None
    assert (found.step, found.messages) == (100, [])
    store = save(config, 200)
    assert names(store) == ["latest", "step_00000100", "step_00000200"]


def test_module_is_light(tmp_path: Path) -> None:
    """The launcher checks the checkpoint before any worker, and torch, is started."""
    code = "import sys, msa_train.checkpoint.store; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
