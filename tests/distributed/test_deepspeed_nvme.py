"""Offload to NVMe changes where numbers are and not one bit of them: steps, refused steps, checkpoints.

By DeepSpeed's own swappers over files of a real disk. What submits the reads and writes is its compiled
library where that is there, and plain ones of Python everywhere, see `plain_aio`.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("deepspeed")

from msa_train.checkpoint.compatibility import fingerprint
from msa_train.checkpoint.load import load_checkpoint
from msa_train.checkpoint.save import CheckpointSaver
from msa_train.checkpoint.store import CheckpointStore
from msa_train.config import CheckpointConfig, Offload, Precision, Recompute, RunConfig
from msa_train.training.engines.deepspeed_engine import DeepSpeedEngine
from msa_train.training.engines.engine import TrainEngine
from tests.helpers import deepspeed_runs, plain_aio
from tests.helpers.deepspeed_runs import (
    Case,
    build,
    destroy,
    packs_of,
    same,
    take_step,
    whole_weights,
)
from tests.helpers.spawn import run_ranks

IN_FILES = {"offload": Offload.nvme, "raw": {"sub_group_size": 3000}}
LIBRARIES = [
    "plain",
    pytest.param("real", marks=pytest.mark.skipif(not plain_aio.is_built(), reason=plain_aio.NOT_BUILT)),
]


def run(rank: int, world_size: int, cases: list[Case], library: str) -> list[dict[str, Any]]:
    """Steps with validations in between, which read weights in an order of their own."""
    plain_aio.install(real=library == "real")
    found = []
    for case in cases:
        engine = build(case)
        rows: list[Any] = []
        for step in range(4):
            rows.append(take_step(engine, step, case.packs))
            if step == 1:
                rows += [engine.evaluate(packs_of(number, 2)) for number in (0, 1)]
        found.append({"rows": rows, "weights": whole_weights(engine), "files": files_of(engine)})
        destroy(engine)
    return found


def files_of(engine: TrainEngine) -> dict[str, int]:
    """Counts of this rank's files, by what they hold."""
    assert isinstance(engine, DeepSpeedEngine)
    if engine.folder is None:
        return {}
    names = [path.name for path in engine.folder.path.rglob("*.swp")]
    kinds = {"moments": "exp_avg", "weights": "_param.", "gradients": "gradient"}
    return {kind: sum(word in name for name in names) for kind, word in kinds.items()} | {"all": len(names)}


def refuse(rank: int, world_size: int, cases: list[Case], library: str) -> list[dict[str, bool]]:
    plain_aio.install(real=library == "real")
    return deepspeed_runs.refuse_steps(rank, world_size, cases)


def pairs(disk: str) -> Iterator[tuple[Case, Case]]:
    """Cases in memory with the same in files."""
    two = Case(3, 4, cp_size=2, recompute=Recompute.full)
    yield two, replace(two, nvme_path=disk, **IN_FILES)
    yield two, replace(two, nvme_path=disk, **IN_FILES, offload_param=Offload.none)
    yield two, replace(two, nvme_path=disk, offload_param=Offload.nvme)
    yield two, replace(two, nvme_path=disk, **IN_FILES, offload_param=Offload.cpu)
    recipe = Case(3, 2, recipe=True, precision=Precision.bf16)
    yield recipe, replace(recipe, nvme_path=disk, **IN_FILES)


@pytest.mark.parametrize("library", LIBRARIES)
def test_steps_have_the_bits_of_the_same_stage_in_memory(library: str, tmp_path: Path) -> None:
    """Clipped steps, validation in between, stages that freeze."""
    listed = list(pairs(str(tmp_path)))
    memory = list(dict.fromkeys(left for left, _ in listed))
    cases = [*memory, *(right for _, right in listed)]
    for of_rank in run_ranks(2, run, cases, library):
        for number, (left, right) in enumerate(listed):
            want, got = of_rank[memory.index(left)], of_rank[len(memory) + number]
            assert got["rows"] == want["rows"], right
            files = got["files"]
            assert (files["moments"] > 0) is (right.offload is Offload.nvme), right
            in_files = right.offload if right.offload_param is None else right.offload_param
            assert (files["weights"] > 0) is (in_files is Offload.nvme), right
            assert not files["gradients"], "they stay in memory"
            assert same(list(got["weights"].values()), list(want["weights"].values())), right
    assert not list(tmp_path.iterdir()), "the folders are taken away"


@pytest.mark.parametrize("library", LIBRARIES)
def test_refused_step_leaves_everything_to_the_bit(library: str, tmp_path: Path) -> None:
    case = Case(3, 2, nvme_path=str(tmp_path), **IN_FILES)
    for (found,) in run_ranks(2, refuse, [case], library):
        assert found == {"kept": True, "followed": True, "moves": True}


def roll_back(rank: int, world_size: int, case: Case, library: str, folder: Path) -> dict[str, bool]:
    """Steps after a checkpoint, twice: with the state that was there, and with the one that was loaded."""
    plain_aio.install(real=library == "real")
    engine = build(case)
    assert isinstance(engine, DeepSpeedEngine)
    take_step(engine, 0, case.packs)
    store = CheckpointStore(folder)
    saver = CheckpointSaver(store, CheckpointConfig(), make_buffer=engine.make_staging)
    meta = {"consumed_samples": 1, "fingerprint": fingerprint(RunConfig()), "layout": {}}
    saver.save(1, lambda: engine.sharded_state(loading=False), {}, meta)
    rows, kept = [], []
    for turn in range(2):
        if turn:
            saver.wait(must_succeed=True)
            state = load_checkpoint(store.path(1), engine.sharded_state(loading=True))
            engine.load_state(state, 1)
        rows.append([take_step(engine, step, case.packs) for step in (1, 2)])
        kept.append(deepspeed_runs.snapshot(engine))
    destroy(engine)
    return {"rows": rows[0] == rows[1], "state": same(kept[0], kept[1])}


@pytest.mark.parametrize("library", LIBRARIES)
def test_rollback_to_a_checkpoint_written_beside_the_training(library: str, tmp_path: Path) -> None:
    disk, store = tmp_path / "disk", tmp_path / "store"
    disk.mkdir()
    case = Case(3, 2, precision=Precision.bf16, nvme_path=str(disk), **IN_FILES)
    for found in run_ranks(2, roll_back, case, library, store):
        assert found == {"rows": True, "state": True}
    assert not list(disk.iterdir())
