"""Imported weights load into any layout and are exported from there as they came; memory stays small."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from msa_train.checkpoint.compatibility import fingerprint
from msa_train.checkpoint.load import load_checkpoint
from msa_train.checkpoint.manifest import verify_folder
from msa_train.checkpoint.store import CheckpointStore
from msa_train.checkpoint.weights_only import checkpoint_folder, publish_weights, shape_of
from msa_train.config import DataConfig, EngineKind, ParallelConfig, Precision, RunConfig, TrainConfig
from msa_train.convert.config_read import read_hf_config
from msa_train.convert.config_write import write_hf_config
from msa_train.convert.export_hf import plan_export, read_config_file, write_export
from msa_train.convert.import_hf import plan_import, write_import
from msa_train.convert.safetensors_files import DTYPES, INDEX_NAME
from msa_train.convert.tensor_map import M3_NAMING, M3_TEXT_NAMING, build_table
from msa_train.parallel.process_groups import build_groups
from msa_train.training.engines.engine import TrainEngine, checkpoint_metadata
from msa_train.training.engines.megatron_engine import MegatronEngine
from msa_train.training.engines.torch_engine import TorchEngine
from tests.helpers import cuda_shim
from tests.helpers.checkpoints import save_checkpoint
from tests.helpers.group_cleanup import leave_groups
from tests.helpers.hf_files import read_tensors, small_m3, write_checkpoint
from tests.helpers.spawn import run_ranks

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {"engine": EngineKind.torch, "parallel": {}}),
    "one-bf16": (1, {"engine": EngineKind.torch, "parallel": {}, "precision": Precision.bf16}),
    "tp2": (2, {"engine": EngineKind.megatron, "parallel": {"tp_size": 2}}),
    "tp2-ep2": (2, {"engine": EngineKind.megatron, "parallel": {"tp_size": 2, "ep_size": 2}}),
    "pp2": (2, {"engine": EngineKind.megatron, "parallel": {"pp_size": 2}}),
    "cp2-ep2": (2, {"engine": EngineKind.torch, "parallel": {"cp_size": 2, "ep_size": 2}}),
    "tp2-pp2-ep2": (
        4,
        {"engine": EngineKind.megatron, "parallel": {"tp_size": 2, "pp_size": 2, "ep_size": 2}},
    ),
}
# 230 MB, the largest tensor 67 MB
BIG = {"hidden_size": 1024, "num_experts": 16, "num_layers": 3}
SHARD_BYTES = 100 * 10**6
GROWTH_BYTES = 100 * 10**6


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    write_checkpoint(folder / "hf", small_m3(), M3_NAMING, dtype=torch.bfloat16)
    hf = read_hf_config(read_config_file(folder / "hf"))
    plan = plan_import(folder / "hf", hf)
    publish_weights(
        folder,
        hf.model,
        hf.attention,
        lambda target: write_import(plan, target, lambda _: None, box_bytes=500),
        source="test",
    )
    return folder


def build(engine: EngineKind, parallel: dict[str, int], precision: Precision = Precision.fp32) -> TrainEngine:
    """An engine over the whole world for the imported model."""
    model, attention = small_m3()
    config = RunConfig(
        engine=engine,
        model=model,
        attention=attention,
        parallel=ParallelConfig(**parallel),
        data=DataConfig(seq_len=96),
        train=TrainConfig(precision=precision),
    )
    kind = TorchEngine if engine is EngineKind.torch else MegatronEngine
    return kind(config, build_groups(config.parallel, device=torch.device("cpu")))


def reshard(rank: int, world_size: int, folder: Path, layouts: dict[str, dict[str, Any]]) -> None:
    """Load the import into each layout and save it from there."""
    cuda_shim.install()
    for name, arguments in layouts.items():
        engine = build(**arguments)
        template = {"model": engine.model.sharded_state_dict(metadata=checkpoint_metadata(engine.groups))}
        # refuses a checkpoint with a key too many or too few
        engine.model.load_state_dict(load_checkpoint(checkpoint_folder(folder), template)["model"])
        save_checkpoint(
            CheckpointStore(folder / name),
            step=1,
            sharded_state={
                "model": engine.model.sharded_state_dict(metadata=checkpoint_metadata(engine.groups))
            },
            common={},
            meta={"consumed_samples": 1, "fingerprint": fingerprint(engine.config), "layout": {}},
        )
        leave_groups()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_layout_loads_an_import_and_exports_the_same_bits(imported: Path, world_size: int) -> None:
    layouts = {name: arguments for name, (size, arguments) in LAYOUTS.items() if size == world_size}
    run_ranks(world_size, reshard, imported, layouts)
    want = read_tensors(imported / "hf")
    for name in layouts:
        checkpoint = checkpoint_folder(imported / name)
        model, attention = shape_of(checkpoint)
        plan = plan_export(checkpoint, model, attention, like=imported / "hf", dtype=torch.bfloat16)
        write_export(plan, imported / f"back-{name}", lambda _: None)
        got = read_tensors(imported / f"back-{name}")
        assert got.keys() == want.keys()
        for key, tensor in want.items():
            assert got[key].dtype is tensor.dtype, (name, key)
            assert torch.equal(got[key], tensor), (name, key)


def test_import_is_a_sound_checkpoint_of_step_0(imported: Path) -> None:
    folder = checkpoint_folder(imported)
    assert folder == imported / "checkpoints" / "step_00000000"
    assert verify_folder(folder, full=True) is None
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["content"], meta["step"], meta["consumed_samples"]) == ("weights", 0, 0)
    model, attention = shape_of(folder)
    want_model, want_attention = small_m3()
    model.init_std, model.embedding_init_std = want_model.init_std, want_model.embedding_init_std
    model.embedding_shared_std = want_model.embedding_shared_std
    model.name, model.layer_attention = want_model.name, want_model.layer_attention
    assert (model, attention) == (want_model, want_attention)


def test_a_failed_import_publishes_nothing(imported: Path, tmp_path: Path) -> None:
    hf = read_hf_config(read_config_file(imported / "hf"))

    def fail(folder: Path) -> dict[str, Any]:
        (folder / "__0_0.distcp").write_bytes(b"half")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        publish_weights(tmp_path, hf.model, hf.attention, fail, source="test")
    assert CheckpointStore(tmp_path).steps() == []
    assert not (tmp_path / "checkpoints").exists()


def write_sparse_checkpoint(folder: Path) -> int:
    """A big checkpoint of zeros in files with holes; returns the size of its tensors."""
    model, attention = small_m3()
    model.hidden_size, model.num_experts, model.num_layers = BIG.values()
    model.ffn_hidden_size = model.moe_ffn_hidden_size = model.shared_expert_hidden_size = 1024
    model.layer_attention = "msa"
    shapes = build_table(model, attention, M3_TEXT_NAMING).hf_shapes
    files: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if size > room:
            files.append([])
            room = SHARD_BYTES
        files[-1].append(name)
        room -= size
    folder.mkdir()
    total, places = 0, {}
    for number, names in enumerate(files):
        header, at = {}, 0
        for name in names:
            size = DTYPES["BF16"].itemsize * torch.Size(shapes[name]).numel()
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [at, at + size]}
            at += size
            places[name] = f"part-{number}.safetensors"
        text = json.dumps(header).encode()
        with (folder / f"part-{number}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + at)
        total += at
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps(write_hf_config(model, attention, dtype="bfloat16")))
    return total


MEASURE = """
import resource, sys
from launchers import convert
import torch, megatron.core.dist_checkpointing
import msa_train.convert.export_hf, msa_train.convert.import_hf, msa_train.checkpoint.weights_only
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
code = convert.main(sys.argv[1:])
print("grown", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
sys.exit(code)
"""


def growth(*arguments: str | Path) -> int:
    """Bytes by which the peak memory of a conversion exceeds that of its imports."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split("grown ")[1])


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_memory_stays_below_a_shard(tmp_path: Path) -> None:
    total = write_sparse_checkpoint(tmp_path / "hf")
    assert total > 2 * GROWTH_BYTES
    assert growth("import", tmp_path / "hf", tmp_path / "ours", "--allow-zeros") < GROWTH_BYTES
    assert growth("export", tmp_path / "ours", tmp_path / "back", "--shard-size", "100MB") < GROWTH_BYTES
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
