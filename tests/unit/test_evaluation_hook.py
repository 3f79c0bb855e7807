"""When evaluations are due between steps, and what becomes of results that a run goes back behind."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from msa_train.config import EvaluationConfig, RunConfig, Stage, StageConfig, TrainConfig, plan_stages
from msa_train.evaluation.log import EvaluationLog, read_rows
from msa_train.training import evaluation_hook
from msa_train.training.evaluation_hook import is_due
from msa_train.training.evaluation_worker import stage_of


def config(run_dir: Path | None = None, *, every: int = 2) -> RunConfig:
    """Stages of steps 1 to 3 and 4 to 8."""
    tokens = 8192
    result = RunConfig(
        train=TrainConfig(steps=8),
        stages={"a": StageConfig(tokens=3 * tokens), "b": StageConfig(tokens=0)},
        evaluation=EvaluationConfig(every=every),
    )
    result.logging.tensorboard = False
    result.run_dir = str(run_dir)
    return result


def test_due_at_multiples_and_at_the_end_of_stages() -> None:
    first, second = plan_stages(config())
    steps = [*((step, first) for step in (1, 2, 3)), *((step, second) for step in range(4, 9))]
    assert [step for step, stage in steps if is_due(config(every=4), step, stage)] == [3, 4, 8]
    assert [step for step, stage in steps if is_due(config(every=100), step, stage)] == [3, 8]


def test_stage_of_a_checkpoint() -> None:
    run = config()
    assert stage_of(run, {"stages": [{"name": "a"}]}).name == "a"
    assert stage_of(run, {"stages": [{"name": "a"}, {"name": "gone"}]}).name == "b"
    assert stage_of(run, {}).name == "b"


class FakeEvaluator:
    """Notes the steps that it is asked for."""

    def __init__(self, *_arguments: Any) -> None:
        self.steps: list[int] = []

    def run(self, step: int, *, source: str, within_stage: bool) -> list[dict[str, Any]]:
        self.steps.append(step)
        assert within_stage
        return [{"kind": "position_loss", "loss_by_log2": {}, "step": step, "source": source}]

    def plan(self, *, within_stage: bool) -> Any:
        return SimpleNamespace(left_out=[65_536])


def hook(run: RunConfig, first_step: int, notes: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(evaluation_hook, "Evaluator", FakeEvaluator)
    reporting = SimpleNamespace(progress=SimpleNamespace(note=notes.append))
    data = SimpleNamespace(validation={})
    made = evaluation_hook.evaluation_hook(run, None, data, reporting, first_step)  # type: ignore[arg-type]
    assert made is not None
    return made


def test_results_of_another_way_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, notes = config(tmp_path), list[str]()
    stage: Stage = plan_stages(run)[1]
    EvaluationLog(tmp_path, tensorboard=False).write(
        [{"kind": "x", "step": step, "source": "training"} for step in (4, 6)]
    )
    between = hook(run, 4, notes, monkeypatch)
    for step in (5, 6, 7):
        between(step, stage)
    # back to step 5 by a rollback, then on in another way
    for step in (6, 7, 8):
        between(step, stage)
    assert [row["step"] for row in read_rows(tmp_path)] == [4, 6, 8]
    assert notes.count("evaluation after step 6:") == 2
    assert "lengths beyond this stage's packs are left out: 65536" in notes
    assert evaluation_hook.evaluation_hook(config(every=0), None, None, None, 0) is None  # type: ignore[arg-type]


def test_code_digest_is_of_the_files() -> None:
    assert len(evaluation_hook.code_digest()) == 16
    facts = evaluation_hook.run_facts(config(), checkpoint="x", weights="y")
    assert facts["checkpoint"] == "x"
    other = config()
    other.model.num_heads *= 2
    assert evaluation_hook.run_facts(other, checkpoint="")["model_digest"] != facts["model_digest"]
