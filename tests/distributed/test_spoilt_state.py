"""What the judging of a step cannot see: weights that an update spoils, and a validation loss that is NaN."""

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest
import torch

from msa_train.checkpoint.store import CheckpointStore
from msa_train.checkpoint.torch_dist.finite_state import DivergedError
from msa_train.config import BadStep, EngineKind
from msa_train.parallel.process_groups import build_groups
from msa_train.training.engines.megatron_engine import MegatronEngine
from msa_train.training.engines.torch_engine import TorchEngine
from msa_train.training.metrics.writer import MetricsWriter
from msa_train.training.trainer import Reporting, Trainer
from msa_train.training.worker import load_data
from tests.helpers import cuda_shim
from tests.helpers.group_cleanup import leave_groups
from tests.helpers.resume_runs import Case, Layout, Record, resume_config
from tests.helpers.spawn import run_ranks
from tests.helpers.training_command import write_corpus

STEPS, EVERY = 8, 3
SIZES = {"cp_size": 2, "ep_size": 2}
NAN, INF = float("nan"), float("inf")
SPOILT = "decoder.layers.0.self_attention.linear_proj.weight"


def spoil_weights(trainer: Trainer, calls: Set[int]) -> None:
    """Updates of these numbers, counted from 1, leave one weight of rank 0 infinite."""
    engine, made = trainer.engine, [0]
    train_step = engine.train_step

    def spoilt_step(*arguments: Any) -> Any:
        made[0] += 1
        result = train_step(*arguments)
        if made[0] in calls and trainer.groups.rank == 0:
            with torch.no_grad():
                engine.model.get_parameter(SPOILT).view(-1)[0] = INF
        return result

    engine.train_step = spoilt_step  # type: ignore[method-assign]


def run(
    folder: str, kind: EngineKind, name: str, policy: BadStep, spoilt: Set[int] = frozenset()
) -> dict[str, Any]:
    """A run of its own; one called "validation" has a validation loss of NaN on one rank."""
    layout = Layout(engine=kind, world_size=2, sizes=SIZES)
    config = resume_config(layout, Path(folder), Case(layout=layout))
    config.run_dir = f"{folder}/{kind.value}-{name}"
    Path(config.run_dir).mkdir(exist_ok=True)
    config.train.steps, config.checkpoint.every, config.checkpoint.keep_last = STEPS, EVERY, 0
    config.train.bad_step, config.train.max_skipped, config.train.max_rollbacks = policy, 2, 1
    if name == "validation":
        config.data.validation_fraction, config.train.validate_every = 0.2, 4
    groups = build_groups(config.parallel, device=torch.device("cpu"), exchange=config.exchange)
    engine = (MegatronEngine if kind is EngineKind.megatron else TorchEngine)(config, groups)
    notes, reporting = Record(), None
    if groups.rank == 0:
        writer = MetricsWriter(config.run_dir, tensorboard=False, resume_step=0)
        reporting = Reporting(writer, notes)  # type: ignore[arg-type]
    store = CheckpointStore(config.run_dir)
    trainer = Trainer(config, groups, engine, load_data(config), store, reporting)
    spoil_weights(trainer, spoilt)
    if groups.rank == 1:
        evaluate = engine.evaluate
        engine.evaluate = lambda packs: NAN * evaluate(packs)  # type: ignore[method-assign]
    error = ""
    try:
        trainer.run(0)
    except DivergedError as diverged:
        error = str(diverged)
    leave_groups()
    return {"error": error, "notes": notes.notes, "saved": store.steps()}


def scenarios(rank: int, world_size: int, folder: str, kind: EngineKind) -> dict[str, dict[str, Any]]:
    if kind is EngineKind.megatron:
        cuda_shim.install()
    return {
        "before a save": run(folder, kind, "save", BadStep.rollback, {6}),
        "before the last save": run(folder, kind, "last", BadStep.rollback, {8}),
        "between saves": run(folder, kind, "between", BadStep.rollback, {4}),
        "again and again": run(folder, kind, "again", BadStep.rollback, {6, 9}),
        "first": run(folder, kind, "first", BadStep.rollback, {3}),
        "skip": run(folder, kind, "skip", BadStep.skip, {6}),
        "validation": run(folder, kind, "validation", BadStep.skip),
    }


@pytest.mark.parametrize("kind", [EngineKind.torch, EngineKind.megatron])
def test_what_judging_does_not_see(kind: EngineKind, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    found, other = run_ranks(2, scenarios, str(tmp_path), kind, timeout_s=120)
    assert {name: run["error"] for name, run in found.items()} == {
        n: run["error"] for n, run in other.items()
    }
    for name, step, back in (("before a save", 6, 3), ("before the last save", 8, 6)):
        assert found[name]["error"] == "", name
        assert found[name]["saved"] == [3, 6, 8]
        (note,) = [note for note in found[name]["notes"] if "going back" in note]
        assert note.startswith(f"step {step}: the update left "), note
        assert f" not finite: going back to step {back} and past " in note
    assert found["between saves"]["error"] == ""
    (note,) = [note for note in found["between saves"]["notes"] if "going back" in note]
    assert note.startswith("step 6: "), note
    assert "; 2 bad steps in a row: going back to step 3 and past" in note
    assert " not finite after 1 rollbacks (train.max_rollbacks); " in found["again and again"]["error"]
    assert found["again and again"]["saved"] == [3]
    assert "not finite; there is no checkpoint to go back to; " in found["first"]["error"]
    assert found["skip"]["error"].startswith("step 6: the update left ")
    check_validation(found["validation"], tmp_path / f"{kind.value}-validation")


def check_validation(found: dict[str, Any], run_dir: Path) -> None:
    """The run comes to its end, and says and records each validation loss that is not finite."""
    assert found["error"] == ""
    assert found["saved"] == [3, 6, 8]
    said = [note for note in found["notes"] if "val_loss" in note]
    assert said == [
        f"step {step}: val_loss=nan: not finite; training goes on, by train.bad_step=skip" for step in (4, 8)
    ]
    events = [json.loads(line) for line in (run_dir / "bad_steps.jsonl").read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events] == [("validation", 4), ("validation", 8)]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_loss" in row.get("nonfinite", [])] == [4, 8]
