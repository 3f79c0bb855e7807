"""Checkpoints of older formats, written by the code of their time, go on in both engines."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest

from msa_train.checkpoint.find import select_checkpoint
from msa_train.checkpoint.load import load_checkpoint, load_weights
from msa_train.checkpoint.manifest import file_entry, read_meta, verify_folder
from msa_train.checkpoint.torch_dist.format_versions import optimizer_updates
from msa_train.config import EngineKind
from tests.helpers import cuda_shim
from tests.helpers.format1 import SAVED_STEP, STEPS, build_format1, format1_config, train_format1
from tests.helpers.group_cleanup import leave_groups
from tests.helpers.spawn import run_ranks

FIXTURES = Path(__file__).parents[1] / "fixtures" / "format1"
# kernels have changed since, and sum in another order
FP32_ROUNDING = 1e-6


def go_on(rank: int, world_size: int, folders: dict[str, str]) -> dict[tuple[str, str], list[float]]:
    cuda_shim.install()
    losses = {}
    for source, folder in folders.items():
        path = Path(folder)
        for engine in (EngineKind.torch, EngineKind.megatron):
            trained = build_format1(engine)
            state = load_checkpoint(path, trained.sharded_state(loading=True))
            trained.load_state(state, optimizer_updates(read_meta(path)))
            losses[source, engine.value] = train_format1(trained, SAVED_STEP, STEPS)
            weights, lacking = load_weights(path, trained.sharded_state(loading=True)["model"])
            assert weights
            assert not lacking
            leave_groups()
    return losses


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folders = {}
    for engine in ("torch", "megatron"):
        folder = tmp_path_factory.mktemp(engine)
        with tarfile.open(FIXTURES / f"{engine}.tar.xz") as tar:
            tar.extractall(folder, filter="data")
        (checkpoint,) = folder.iterdir()
        folders[engine] = str(checkpoint)
    return folders


def test_format_1_goes_on_in_both_engines(unpacked: dict[str, str]) -> None:
    (losses,) = run_ranks(1, go_on, unpacked)
    wanted = json.loads((FIXTURES / "losses.json").read_text())
    for source, folder in unpacked.items():
        assert verify_folder(Path(folder), full=True) is None
        for engine in ("torch", "megatron"):
            got = losses[source, engine]
            assert got == pytest.approx(wanted[source], rel=FP32_ROUNDING), (source, engine)


def test_newer_format_names_the_version(unpacked: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "newer"
    shutil.copytree(unpacked["torch"], folder)
    config = format1_config(EngineKind.torch)
    config.run_dir, config.checkpoint.load = str(tmp_path / "run"), str(folder)
    assert select_checkpoint(config, full=True) is not None
    text = (folder / "meta.json").read_text()
    (folder / "meta.json").write_text(text.replace('"format_version": 1', '"format_version": 9'))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["meta.json"] = file_entry(folder / "meta.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"has format 9, written by msa-train .* knows formats up to 2"):
        select_checkpoint(config, full=True)
