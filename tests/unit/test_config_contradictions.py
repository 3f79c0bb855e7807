"""Settings that cancel one another are named before a run starts, and are no mistakes."""

from pathlib import Path

import pytest

from launchers import train
from launchers.hydra_config.compose import compose_run
from msa_train.config import contradictions

CASES = {
    "train.steps=4 optim.warmup_steps=5": "optim.warmup_steps=5: the run ends after 4 steps, ",
    "train.steps=30 optim.warmup_steps=100": "use optim.warmup_steps=3, or more steps",
    "stages=warmup stages.dense_warmup.tokens=4096 stages.dense_warmup.warmup_steps=3": (
        "stages.dense_warmup.warmup_steps=3: the stage ends after 2 steps, "
    ),
    "logging.every=21": "logging.every=21: no step is shown or written to metrics.jsonl, ",
    "checkpoint.load_weights_only=true": "has no effect without checkpoint.load; ",
    "checkpoint.keep_every=10 checkpoint.keep_last=0": "checkpoint.keep_every=10: has no effect, ",
    "train.bad_step=rollback checkpoint.every=50": "rollback: there is nothing to go back to, ",
}


@pytest.mark.parametrize("settings", CASES)
def test_each_is_named_once(settings: str) -> None:
    (line,) = contradictions(compose_run(["run=smoke", *settings.split()]))
    assert CASES[settings] in line


@pytest.mark.parametrize(
    "run",
    ["smoke", "demo", "demo_warmup", "m2_32k", "m3_200k", "m3_1m", "convert_full_to_msa"],
)
def test_runs_that_come_along_have_none(run: str) -> None:
    assert contradictions(compose_run([f"run={run}"])) == []


def test_checking_a_run_tells_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    corpus = tmp_path / "a.txt"
    corpus.write_text("some text " * 1000)
    settings = ["run=smoke", f"data.corpus={corpus}", f"data.cache_dir={tmp_path}", f"run_dir={tmp_path}"]
    settings += ["launcher.device=cpu", "data.validation_fraction=0", "train.validate_every=0"]
    assert train.main([*settings, "train.steps=2", "--check"]) == 0
    assert "warning: optim.warmup_steps=4: the run ends after 2 steps" in capsys.readouterr().out
