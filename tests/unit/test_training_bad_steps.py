"""What is a bad step, and what becomes of a run with too many of them."""

import errno
import math
from pathlib import Path

import pytest

from msa_train.config import BadStep, TrainConfig
from msa_train.training.stability import skip_policy as bad_steps_module
from msa_train.training.stability.skip_policy import EventLog, RollbackError, SkipPolicy


def bad_steps(**settings: object) -> SkipPolicy:
    return SkipPolicy(TrainConfig(**({"bad_step": BadStep.rollback, "max_skipped": 2} | settings)))  # type: ignore[arg-type]


def test_what_is_not_finite_is_bad() -> None:
    steps = bad_steps()
    assert steps.find_fault(1.0, 2.0) == ""
    assert steps.find_fault(math.nan, 2.0) == "lm_loss=nan: not finite"
    assert steps.find_fault(1.0, math.inf) == "grad_norm=inf: not finite"
    assert steps.find_fault(1.0, 2.0, math.inf) == "kl_loss=inf: not finite"


def test_spikes_are_measured_against_the_median() -> None:
    steps = bad_steps(spike_factor=2.0, spike_window=3)
    for loss in (1.0, 9.0):
        assert steps.find_fault(100.0, 1.0) == "", "too few losses to compare with"
        steps.record_taken(loss)
    steps.record_taken(1.5)
    assert steps.find_fault(3.0, 1.0) == ""
    assert "above train.spike_factor=2 times 1.5" in steps.find_fault(3.01, 1.0)
    steps.record_taken(3.0)
    assert steps.find_fault(3.01, 1.0) == "", "the median is now 3"
    steps.new_stage()
    assert steps.find_fault(100.0, 1.0) == ""
    assert bad_steps().find_fault(1e30, 1.0) == "", "spikes are looked for only where asked"


def test_a_good_step_ends_a_row() -> None:
    steps = bad_steps()
    for step in (1, 3, 5):
        steps.record_skipped()
        assert steps.decide(step, "why") == f"step {step} is left out (why)"
        steps.record_taken(1.0)
    assert (steps.skipped, steps.in_a_row) == (3, 0)


def test_too_many_in_a_row_go_back_and_pass_over() -> None:
    steps = bad_steps(max_rollbacks=1)
    recorded = steps.record()
    for step in (7, 8):
        steps.record_skipped()
        if step == 7:
            steps.decide(step, "why")
    with pytest.raises(RollbackError) as caught:
        steps.decide(8, "why")
    assert (caught.value.step, caught.value.last_good) == (8, 6)
    steps.go_back(recorded, {"from_step": 8}, tokens=96)
    assert (steps.skipped, steps.in_a_row, steps.rollbacks) == (0, 0, [{"from_step": 8}])
    restored = bad_steps(max_rollbacks=1)
    restored.restore(steps.record())
    assert restored.record() == steps.record()
    for again in (steps, restored):
        for _ in range(2):
            again.record_skipped()
        with pytest.raises(ValueError, match=r"2 steps in a row are bad .* after 1 rollbacks"):
            again.decide(8, "why")


def test_policies_that_end() -> None:
    for policy, text in ((BadStep.end, "^why$"), (BadStep.skip, "^why; 1 steps in a row are bad")):
        steps = bad_steps(bad_step=policy, max_skipped=1)
        steps.record_skipped()
        with pytest.raises(ValueError, match=text):
            steps.decide(1, "why")
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
