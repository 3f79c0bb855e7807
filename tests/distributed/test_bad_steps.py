"""Steps with a poisoned loss are left out to the last bit, or take the run back; a resume changes nothing."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from msa_train.checkpoint.store import CheckpointStore
from msa_train.checkpoint.torch_dist.finite_state import DivergedError
from msa_train.config import BadStep, EngineKind, Precision, RunConfig
from msa_train.data import Pack
from msa_train.model.pack_forward import PackForward
from msa_train.parallel.process_groups import build_groups
from msa_train.training import stage_packs
from msa_train.training.engines.engine import TrainEngine
from msa_train.training.metrics.writer import MetricsWriter, read_metrics
from msa_train.training.resume import resume
from msa_train.training.trainer import Reporting, Trainer
from msa_train.training.worker import build_engine, load_data
from tests.helpers import cuda_shim
from tests.helpers.group_cleanup import leave_groups
from tests.helpers.resume_runs import BATCH, SEQ_LEN, Case, Layout, Record, SeenStream, pack_id, resume_config
from tests.helpers.spawn import run_ranks
from tests.helpers.training_command import write_corpus

STEPS = 12
NAN, SPIKE = float("nan"), 10.0
LAYOUTS = {
    "torch": Layout(engine=EngineKind.torch, world_size=1),
    "megatron": Layout(engine=EngineKind.megatron, world_size=1),
    "torch-cp2-ep2": Layout(engine=EngineKind.torch, world_size=2, sizes={"cp_size": 2, "ep_size": 2}),
    "deepspeed-z1": Layout(
        engine=EngineKind.deepspeed,
        world_size=2,
        sizes={"cp_size": 2, "ep_size": 2},
        zero_stage=1,
        precision=Precision.bf16,
    ),
    "deepspeed-z3": Layout(
        engine=EngineKind.deepspeed,
        world_size=2,
        sizes={"cp_size": 2},
        zero_stage=3,
        precision=Precision.bf16,
    ),
}


class Poisoned(PackForward):
    """Multiplies the losses of some packs; factors: by what, by pack_id."""

    factors: dict[int, float]
    _factor = 1.0

    def prepare(self, pack: Pack, **arguments: Any) -> Any:
        """See PackForward."""
        self._factor = self.factors.get(pack_id(pack), 1.0)
        return super().prepare(pack, **arguments)

    def __call__(self, *arguments: Any) -> Tensor:
        """See PackForward."""
        return super().__call__(*arguments) * self._factor


def start(config: RunConfig, poison: dict[int, float], stop_after: int = STEPS) -> dict[str, Any]:
    """One start of a run; poison: factor by number of a pack. Returns what this rank saw."""
    groups = build_groups(config.parallel, device=torch.device("cpu"), exchange=config.exchange)
    Path(config.run_dir).mkdir(parents=True, exist_ok=True)
    engine = build_engine(config, groups)
    data = load_data(config)
    engine.forward.__class__ = Poisoned
    engine.forward.factors = {pack_id(data.train[SEQ_LEN][i]): factor for i, factor in poison.items()}  # type: ignore[attr-defined]
    resumed = resume(config, engine)
    SeenStream.seen = []
    stage_packs.BatchStream = SeenStream  # type: ignore[misc]
    notes = Record()
    reporting = None
    if groups.rank == 0:
        writer = MetricsWriter(config.run_dir, tensorboard=False, resume_step=resumed.step)
        reporting = Reporting(writer, notes)  # type: ignore[arg-type]
    trainer = Trainer(config, groups, engine, data, CheckpointStore(config.run_dir), reporting)
    trainer.bad_steps.restore(resumed.bad_steps)
    states: list[tuple[int, str]] = []

    def after_step(step: int) -> None:
        states.append((step, digest(engine)))
        if step == stop_after:
            raise KeyboardInterrupt

    error = ""
    try:
        trainer.run(resumed.step, after_step)
    except DivergedError as diverged:
        error = str(diverged)
    except KeyboardInterrupt:
        pass
    numbers = {pack_id(data.train[SEQ_LEN][i]): i for i in range(4 * STEPS * BATCH)}
    seen = [[numbers[pack] for pack in step] for step in SeenStream.seen]
    leave_groups()
    return {"states": states, "seen": seen, "error": error, "notes": notes.notes, "first": resumed.step}


def digest(engine: TrainEngine) -> str:
    """Of weights, router biases and the optimizer's state."""
    result = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                add(value[key])
        elif isinstance(value, list):
            # boxes of what this rank owns
            for box in value:
                add(box)
        elif getattr(value, "data", None) is not None and isinstance(value.data, Tensor):
            result.update(value.data.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())

    add(engine.sharded_state(loading=False))
    return result.hexdigest()


def scenarios(rank: int, world_size: int, folder: str, name: str) -> dict[str, Any]:
    layout = LAYOUTS[name]
    if layout.engine is EngineKind.megatron:
        cuda_shim.install()

    def config_of(run: str, **changes: Any) -> RunConfig:
        config = resume_config(layout, Path(folder), Case(layout=layout))
        config.run_dir = f"{folder}/{name}-{run}"
        config.checkpoint.every, config.checkpoint.keep_last = 3, 0
        config.train.bad_step, config.train.max_skipped = BadStep.rollback, 2
        for key, value in changes.items():
            setattr(config.train, key, value)
        return config

    poison = {i: NAN for i in range(6 * BATCH, 9 * BATCH)}
    found = {
        "plain": start(config_of("plain"), {}),
        "skip": start(config_of("skip"), {4 * BATCH + 1: NAN}),
        "rollback": start(config_of("rollback"), poison),
        "cut": start(config_of("cut"), poison, stop_after=10),
        "resumed": start(config_of("cut"), poison),
    }
    if layout.engine is EngineKind.deepspeed:
        # what is left judges losses, and asks nothing more of an engine
        return found
    found |= {
        "spike": start(config_of("spike", spike_factor=3.0, spike_window=3), {5 * BATCH: SPIKE * BATCH}),
        "end": start(config_of("end", bad_step=BadStep.end, spike_factor=3.0, spike_window=3), {8: SPIKE}),
        "worn out": start(config_of("worn", max_rollbacks=1), {i: NAN for i in range(6 * BATCH, 99)}),
    }
    return found


@pytest.fixture(scope="module", params=list(LAYOUTS))
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path, str]:
    folder = tmp_path_factory.mktemp("bad_steps")
    write_corpus(folder / "corpus")
    ranks = run_ranks(LAYOUTS[request.param].world_size, scenarios, str(folder), request.param)
    for other in ranks[1:]:
        for run, result in other.items():
            assert result["error"] == ranks[0][run]["error"]
            assert result["seen"] == ranks[0][run]["seen"]
    return ranks[0], folder, request.param


def packs_of(*steps: int) -> list[list[int]]:
    """Numbers of the packs of steps of a run that nothing happened to."""
    return [[(step - 1) * BATCH + i for i in range(BATCH)] for step in steps]


def test_a_bad_step_changes_nothing(runs: tuple[dict[str, Any], Path, str]) -> None:
    found, folder, name = runs
    states, plain = dict(found["skip"]["states"]), dict(found["plain"]["states"])
    assert states[4] == plain[4]
    assert states[5] == states[4]
    assert len(set(states.values())) == STEPS - 1, "all other steps change something"
    assert found["skip"]["seen"] == packs_of(*range(1, STEPS + 1))
    rows = read_metrics(folder / f"{name}-skip")
    assert [row["step"] for row in rows if "bad_step" in row] == [5]
    assert rows[4]["nonfinite"]
    assert [row["skipped_steps"] for row in rows] == [0] * 4 + [1] * 8
    (event,) = map(json.loads, (folder / f"{name}-skip" / "bad_steps.jsonl").read_text().splitlines())
    assert event["packs"] == [4 * BATCH, 5 * BATCH - 1]
    meta = json.loads((folder / f"{name}-skip" / "checkpoints" / "latest" / "meta.json").read_text())
    assert (meta["step"], meta["optimizer_updates"], meta["bad_steps"]["skipped"]) == (12, 11, 1)


def test_too_many_take_the_run_back_and_past_their_packs(runs: tuple[dict[str, Any], Path, str]) -> None:
    """Checkpoint of step 6; the packs of steps 7 to 9 are poisoned, two bad steps in a row go back."""
    found, folder, name = runs
    seen = found["rollback"]["seen"]
    # 7 and 8 are bad; back at 6 the ninth step's packs come next, bad too, and then good ones
    assert seen == packs_of(*range(1, 9), *range(9, 15))
    states = found["rollback"]["states"]
    assert [step for step, _ in states] == [1, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11, 12]
    assert states[6][1] == states[5][1] == states[7][1], "bad steps and the way back change nothing"
    rows = read_metrics(folder / f"{name}-rollback")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["rollbacks"] for row in rows] == [0] * 6 + [1] * 6
    assert rows[-1]["passed_over_tokens"] == 2 * BATCH * SEQ_LEN
    assert any("going back to step 6 and past" in note for note in found["rollback"]["notes"])


def test_a_resume_keeps_the_stream(runs: tuple[dict[str, Any], Path, str]) -> None:
    """Cut off at step 10, behind the rollback; the checkpoint of step 9 knows of it."""
    found, folder, name = runs
    assert found["resumed"]["first"] == 9
    assert found["resumed"]["seen"] == packs_of(12, 13, 14)
    assert found["resumed"]["states"] == found["rollback"]["states"][-3:]
    whole, cut = (read_metrics(folder / f"{name}-{run}") for run in ("rollback", "cut"))
    for key in ("step", "lm_loss", "grad_norm", "skipped_steps", "rollbacks", "passed_over_tokens"):
        assert [row[key] for row in cut] == [row[key] for row in whole], key


def test_spikes_and_ends(runs: tuple[dict[str, Any], Path, str]) -> None:
    found, folder, name = runs
    if "spike" not in found:
        pytest.skip("engines judge by the same numbers")
    states = dict(found["spike"]["states"])
    assert states[5] == states[6] != states[7]
    error = found["end"]["error"]
    assert error.startswith("step 5: lm_loss="), error
    assert "the newest checkpoint is of step 3; " in error
    assert [step for step, _ in found["end"]["states"]] == [1, 2, 3, 4]
    assert "after 1 rollbacks (train.max_rollbacks)" in found["worn out"]["error"]
    assert CheckpointStore(folder / f"{name}-worn").steps() == [3, 6]
