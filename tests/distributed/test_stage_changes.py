"""Stages of other layouts, lengths, batches and top-k compute what one process computes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from msa_train.checkpoint.store import CheckpointStore
from msa_train.config import (
    AlternateConfig,
    EngineKind,
    Precision,
    RunConfig,
    StageConfig,
    StageParallelConfig,
    StageSchedule,
)
from msa_train.config.staging.views import layout_config
from msa_train.parallel.process_groups import build_groups
from msa_train.training import stage_packs
from msa_train.training.resume import resume
from msa_train.training.trainer import Reporting, Trainer
from msa_train.training.worker import build_engine, load_data, own_layout
from tests.helpers import cuda_shim, devices
from tests.helpers.group_cleanup import leave_groups
from tests.helpers.resume_runs import Case, Layout, Record, SeenStream, resume_config
from tests.helpers.spawn import run_ranks

FIRST, STEPS = 3, 8
KEYS = ("lm_loss", "kl_loss", "grad_norm")


def staged_config(folder: Path, engine: EngineKind, precision: Precision, name: str) -> RunConfig:
    """Three stages: packs of 32, then of 64 with other blocks and steps of 16, then other rates alone."""
    layout = Layout(engine=engine, world_size=2, precision=precision)
    config = resume_config(layout, folder, Case(layout=layout))
    config.run_dir = str(folder / name)
    config.train = replace(config.train, steps=0)
    config.checkpoint.every = 100
    config.logging.attention_every = 2
    config.stages = {
        "short": StageConfig(tokens=FIRST * 4 * 32, seq_len=32, global_batch_size=4, topk=2),
        "long": StageConfig(
            tokens=4 * 128,
            alternate=AlternateConfig(every=2, seq_len=16),
            lr=1e-3,
            index_lr=5e-3,
            schedule=StageSchedule.cosine,
            min_lr_ratio=0.2,
        ),
        "end": StageConfig(tokens=2 * 64, topk=3, lr=5e-4, schedule=StageSchedule.constant),
    }
    return config


def run_to_the_end(config: RunConfig) -> dict[str, Any]:
    """Train in the layouts of the stages, one after another; rows and packs of this rank."""
    rows: list[dict[str, Any]] = []
    SeenStream.seen = []
    stage_packs.BatchStream = SeenStream  # type: ignore[misc]
    layouts: list[tuple[int, int]] = []
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    while True:
        own = own_layout(config)
        groups = build_groups(own.parallel, device=devices.rank_device(), exchange=own.exchange)
        layouts.append((groups.cp_size, groups.dp_size))
        engine = build_engine(own, groups)
        record = Record()
        reporting: Any = Reporting(record, record) if groups.rank == 0 else None  # type: ignore[arg-type]
        first = resume(own, engine).step
        trainer = Trainer(own, groups, engine, load_data(own), CheckpointStore(own.run_dir), reporting)
        trainer.run(first)
        rows += record.rows
        leave_groups()
        if trainer.next_stage is None:
            return {"rows": rows, "seen": SeenStream.seen, "layouts": layouts}
        assert len(layouts) < 4, "a stage is trained once"


def scenario(rank: int, world_size: int, folder: str, engine: EngineKind, precision: Precision) -> Any:
    if engine is EngineKind.megatron:
        cuda_shim.install()
    config = staged_config(Path(folder), engine, precision, f"{engine.value}{world_size}")
    if world_size > 1:
        config.parallel.cp_size, config.parallel.ep_size = 2, 2
        config.stages["long"].parallel = StageParallelConfig(cp_size=1, ep_size=1)
        config.stages["end"].parallel = StageParallelConfig(cp_size=1)
    result = run_to_the_end(config)
    dist.barrier()
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    (folder / "corpus").mkdir()
    for number in range(30):
        text = " ".join(f"w{(number * 7 + i * i) % 97}" for i in range(3 + 11 * number % 60))
        (folder / "corpus" / f"{number}.txt").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("engine", "precision", "tolerance"),
    [(EngineKind.torch, Precision.fp64, 1e-10), (EngineKind.megatron, Precision.fp32, 2e-5)],
)
def test_two_ranks_in_two_layouts_equal_one(
    folder: Path, engine: EngineKind, precision: Precision, tolerance: float
) -> None:
    (one,) = run_ranks(1, scenario, str(folder), engine, precision)
    both = run_ranks(2, scenario, str(folder), engine, precision)
    assert one["layouts"] == [(1, 1)]
    # the last stage has experts over two ranks again
    assert both[0]["layouts"] == [(2, 1), (1, 2), (1, 2)]
    assert [row["step"] for row in both[0]["rows"]] == list(range(1, len(one["rows"]) + 1))
    for ours, theirs in zip(both[0]["rows"], one["rows"], strict=True):
        assert (ours["tokens"], ours["lr"], ours["index_lr"]) == tuple(
            theirs[key] for key in ("tokens", "lr", "index_lr")
        )
        for key in KEYS:
            assert abs(ours[key] - theirs[key]) <= tolerance * abs(theirs[key]), (ours["step"], key)
    # the same packs, shared in the first stage, dealt by turns later
    for step, packs in enumerate(one["seen"]):
        ours = [both[rank]["seen"][step] for rank in range(2)]
        if step < FIRST:
            assert ours == [packs, packs]
        else:
            assert ours == [packs[0::2], packs[1::2]]
    assert torch.tensor([row["lr"] for row in one["rows"]]).min() > 0
    assert layout_config(RunConfig(), "main").parallel == RunConfig().parallel
