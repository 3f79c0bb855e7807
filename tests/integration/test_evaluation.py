"""Evaluations through the real commands: in training, where they change no bit of it, and of a checkpoint."""

from pathlib import Path

from msa_train.checkpoint.diff import diff_checkpoints
from msa_train.evaluation.log import read_rows
from msa_train.training.metrics.writer import read_metrics
from tests.helpers.training_command import Training, train, without_times
from tests.integration.test_resume import ONE_PROCESS

STEPS = 3
LONGER = "data.seq_len=1024"
EVALUATION = (
    "evaluation.every=2",
    'evaluation.tasks="niah_single_2,vt"',
    'evaluation.lengths="960,1024"',
    "evaluation.samples=3",
    "evaluation.depths=3",
    "evaluation.held_out_packs=2",
    'evaluation.contexts="64,384"',
    "evaluation.last_tokens=64",
)
# keys that tell what a row is of
IDENTITY = {
    *("mode", "task", "length", "samples", "seed", "depths", "step", "stage", "rope", "topk", "checkpoint"),
    *(
        "weights",
        "model_digest",
        "code",
        "tokenizer",
        "tokenizer_name",
        "wording",
        "words",
        "haystack",
        "source",
        "run",
    ),
}


def test_evaluations_change_no_bit_of_the_training(tiny: tuple[str, ...], tmp_path: Path) -> None:
    plain, evaluated = tmp_path / "plain", tmp_path / "evaluated"
    settings = (*tiny, LONGER, f"train.steps={STEPS}", "checkpoint.every=2", "train.validate_every=2")
    train(*settings, f"run_dir={plain}")
    output = train(*settings, f"run_dir={evaluated}", *EVALUATION, "logging.tensorboard=true")
    for one, other in zip(read_metrics(plain), read_metrics(evaluated), strict=True):
        assert without_times(one) == without_times(other)
    for step in (2, STEPS):
        name = f"checkpoints/step_{step:08d}"
        found = diff_checkpoints(plain / name, evaluated / name)
        assert found.is_empty, found
        assert found.num_equal > 10

    rows = read_rows(evaluated)
    tasks = [(row["step"], row["length"], row["task"]) for row in rows if row["kind"] == "task"]
    assert tasks == [
        (step, length, task)
        for step in (2, STEPS)
        for length in (960, 1024)
        for task in ("niah_single_2", "vt")
    ]
    needle = rows[0]
    assert needle.keys() >= IDENTITY
    assert needle["by_depth"].keys() == {"0.00", "0.50", "1.00"}
    assert needle["needle_rate"].keys() == {"layer02", "layer03"}
    assert all(len(rates) == 2 for rates in needle["needle_rate"].values())
    assert "hit_rate" not in rows[1]
    (position, _) = (row for row in rows if row["kind"] == "position_loss")
    assert [int(number) for number in position["loss_by_log2"]][:9] == list(range(9))
    # an untrained model knows 257 of its 512 words at most
    assert all(3 < loss < 8 for _, loss in position["loss_by_log2"].values())
    (gain, _) = (row for row in rows if row["kind"] == "context_gain")
    assert list(gain["contexts"]) == ["64", "384"]
    assert gain["contexts"]["64"]["documents"] >= gain["contexts"]["384"]["documents"] > 0
    assert "evaluation after step 3:\n" in output
    assert "niah_single_2  960" in output
    assert list((evaluated / "tensorboard/evaluation").glob("events*"))

    _evaluate_the_checkpoint(tiny, evaluated)


def _evaluate_the_checkpoint(tiny: tuple[str, ...], run_dir: Path) -> None:
    """In another layout; the figures are those of the training."""
    before = [row for row in read_rows(run_dir) if row["step"] == STEPS]
    settings = (*tiny, LONGER, *ONE_PROCESS, *EVALUATION, f"run_dir={run_dir}", f"train.steps={STEPS}")
    output = train(*settings, module="launchers.evaluate")
    assert f"evaluating {run_dir}/checkpoints/step_0000000{STEPS}, step {STEPS}, stage main\n" in output
    after = [row for row in read_rows(run_dir) if row["source"] == "msa-eval"]
    assert len(after) == len(before)
    for ours, theirs in zip(after, before, strict=True):
        assert ours["kind"] == theirs["kind"]
        assert ours.get("hits") == theirs.get("hits")
        if ours["kind"] == "task":
            assert abs(ours["nll_per_token"] - theirs["nll_per_token"]) < 1e-5 * theirs["nll_per_token"]
            assert ours["weights"].startswith("sha256:")
            assert ours["checkpoint"].endswith(f"step_0000000{STEPS}")
            assert ours["model_digest"] == theirs["model_digest"]
    # the run's own settings are those of its training
    assert "tasks: niah_single_2,vt" in (run_dir / "config.yaml").read_text()
    assert (run_dir / "evaluation/config.yaml").exists()


def test_nothing_starts_with_bad_settings(tiny: tuple[str, ...], tmp_path: Path) -> None:
    for setting, message in (
        ("evaluation.lengths=2048", "is longer than the longest pack of the run, 512 tokens"),
        ("evaluation.lengths=128", "is too short for niah_single_2"),
    ):
        settings = (*tiny, f"run_dir={tmp_path}/none", "train.steps=1", "evaluation.every=1", setting)
        with Training(*settings) as training:
            assert training.end() == 2
            assert training.errors.startswith(f"msa-train: error: {setting}: {message}")
            assert training.errors.count("\n") == 1
    with Training(*tiny, f"run_dir={tmp_path}/none", module="launchers.evaluate") as evaluation:
        assert evaluation.end() == 2
        assert evaluation.errors.startswith(f"msa-eval: error: checkpoint.load={tmp_path}/none: ")
