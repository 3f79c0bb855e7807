"""What is a bad step, and what becomes of a run with too many of them."""

import errno
import math
from pathlib import Path

import pytest

from msa_train.config import BadStep, TrainConfig
from msa_train.training import bad_steps as bad_steps_module
from msa_train.training.bad_steps import BadSteps, EventLog, RollbackError


def bad_steps(**settings: object) -> BadSteps:
    return BadSteps(TrainConfig(**({"bad_step": BadStep.rollback, "max_skipped": 2} | settings)))  # type: ignore[arg-type]


def test_what_is_not_finite_is_bad() -> None:
    steps = bad_steps()
    assert steps.complaint(1.0, 2.0) == ""
    assert steps.complaint(math.nan, 2.0) == "lm_loss=nan: not finite"
    assert steps.complaint(1.0, math.inf) == "grad_norm=inf: not finite"
    assert steps.complaint(1.0, 2.0, math.inf) == "kl_loss=inf: not finite"


def test_spikes_are_measured_against_the_median() -> None:
    steps = bad_steps(spike_factor=2.0, spike_window=3)
    for loss in (1.0, 9.0):
        assert steps.complaint(100.0, 1.0) == "", "too few losses to compare with"
        steps.take(loss)
    steps.take(1.5)
    assert steps.complaint(3.0, 1.0) == ""
    assert "above train.spike_factor=2 times 1.5" in steps.complaint(3.01, 1.0)
    steps.take(3.0)
    assert steps.complaint(3.01, 1.0) == "", "the median is now 3"
    steps.new_stage()
    assert steps.complaint(100.0, 1.0) == ""
    assert bad_steps().complaint(1e30, 1.0) == "", "spikes are looked for only where asked"


def test_a_good_step_ends_a_row() -> None:
    steps = bad_steps()
    for step in (1, 3, 5):
        steps.leave_out()
        assert steps.verdict(step, "why") == f"step {step} is left out (why)"
        steps.take(1.0)
    assert (steps.skipped, steps.in_a_row) == (3, 0)


def test_too_many_in_a_row_go_back_and_pass_over() -> None:
    steps = bad_steps(max_rollbacks=1)
    recorded = steps.record()
    for step in (7, 8):
        steps.leave_out()
        if step == 7:
            steps.verdict(step, "why")
    with pytest.raises(RollbackError) as caught:
        steps.verdict(8, "why")
    assert (caught.value.step, caught.value.last_good) == (8, 6)
    steps.go_back(recorded, {"from_step": 8}, tokens=96)
    assert (steps.skipped, steps.in_a_row, steps.rollbacks) == (0, 0, [{"from_step": 8}])
    assert [steps.passed_over_packs(length) for length in (32, 64)] == [3, 2]
    restored = bad_steps(max_rollbacks=1)
    restored.restore(steps.record())
    assert restored.record() == steps.record()
    for again in (steps, restored):
        for _ in range(2):
            again.leave_out()
        with pytest.raises(ValueError, match=r"2 steps in a row are bad .* after 1 rollbacks"):
            again.verdict(8, "why")


def test_policies_that_end() -> None:
    for policy, text in ((BadStep.end, "^why$"), (BadStep.skip, "^why; 1 steps in a row are bad")):
        steps = bad_steps(bad_step=policy, max_skipped=1)
        steps.leave_out()
        with pytest.raises(ValueError, match=text):
            steps.verdict(1, "why")
    assert not bad_steps(bad_step=BadStep.end).judges
    assert bad_steps(bad_step=BadStep.end, spike_factor=3.0).judges


def test_events_wait_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(tmp_path)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(bad_steps_module.os, "write", full)
        told = [log.write({"step": step}) for step in (1, 2)]
    assert told == [
        f"{tmp_path / 'bad_steps.jsonl'}: No space left on device; training goes on, its lines are written "
        "when they can be",
        "",
    ]
    assert log.write({"step": 3}) == ""
    lines = (tmp_path / "bad_steps.jsonl").read_text().splitlines()
    assert lines == ['{"step": 1}', '{"step": 2}', '{"step": 3}']
