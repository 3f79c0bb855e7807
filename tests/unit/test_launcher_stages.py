"""Processes of one stage after those of another: the launcher's part, without processes."""

import json
import signal
from pathlib import Path

import pytest

from launchers.cli.command_line import NEXT_STAGE, STOPPED
from launchers.local import launch_checks
from launchers.local.stage_starts import start_stages
from msa_train.config import AlternateConfig, RunConfig, StageConfig
from msa_train.runtime import preemption
from msa_train.runtime.next_stage import MARK_NAME, VARIABLE, NextStage, asked_stage, read_next, write_next
from msa_train.runtime.preemption import read_stopped


class Workers:
    """Starts that end as they are told: (stage to go on with, its step), or an exit code."""

    def __init__(self, run_dir: Path, *ends: tuple[str, int] | int) -> None:
        self.run_dir, self.ends, self.asked = run_dir, list(ends), list[str]()

    def __call__(self) -> int:
        self.asked.append(asked_stage())
        assert not (self.run_dir / MARK_NAME).exists()
        end = self.ends.pop(0)
        if isinstance(end, int):
            return end
        write_next(self.run_dir, NextStage(step=end[1], stage=end[0], generation=""))
        return NEXT_STAGE


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "stale")


@pytest.mark.parametrize("code", [0, 1, STOPPED])
def test_starts_follow_one_another(tmp_path: Path, code: int) -> None:
    workers = Workers(tmp_path, ("long", 10), ("longer", 20), code)
    assert start_stages(str(tmp_path), workers) == code
    assert workers.asked == ["", "long", "longer"]
    assert not workers.ends


def test_a_fallback_to_an_earlier_stage_is_followed_once(tmp_path: Path) -> None:
    workers = Workers(tmp_path, ("long", 10), ("first", 6), ("long", 10), 0)
    assert start_stages(str(tmp_path), workers) == 0
    with pytest.raises(ValueError, match="those of long did so again at step 10"):
        start_stages(str(tmp_path), Workers(tmp_path, ("long", 10), ("long", 10)))


def test_asked_to_stop_between_two_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "_requested", int(signal.SIGTERM))
    workers = Workers(tmp_path, ("long", 10), 0)
    assert start_stages(str(tmp_path), workers) == STOPPED
    stopped = read_stopped(tmp_path)
    assert stopped is not None
    assert (stopped.step, stopped.signal, stopped.saved) == (10, "SIGTERM", True)
    assert workers.asked == [""]


def test_mark_that_is_missing_or_damaged(tmp_path: Path) -> None:
    assert read_next(tmp_path) is None
    with pytest.raises(ValueError, match="does not say which"):
        start_stages(str(tmp_path), lambda: NEXT_STAGE)
    (tmp_path / MARK_NAME).write_text(json.dumps({"step": "10"}))
    with pytest.raises(ValueError, match="is damaged"):
        read_next(tmp_path)


def test_one_document_is_not_dealt_to_two_lengths() -> None:
    config = RunConfig(stages={"long": StageConfig()})
    launch_checks._check_alternate(config, 1)
    config.stages["long"].alternate = AlternateConfig(every=3, seq_len=1024)
    launch_checks._check_alternate(config, 3)
    with pytest.raises(ValueError, match=r"^stages\.long\.alternate\.every=3: .* use at least 3, or"):
        launch_checks._check_alternate(config, 2)
