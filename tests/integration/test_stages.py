"""Stages through the real command: a switch survives kills bit for bit; full attention becomes MSA."""

from pathlib import Path

from msa_train.checkpoint.manifest import read_meta
from msa_train.checkpoint.store import CheckpointStore
from msa_train.training.metrics.writer import read_metrics
from tests.helpers.training_command import Training, last_step, train, without_times
from tests.integration.test_resume import ONE_PROCESS

DENSE_STEPS, STEPS = 5, 9
# Shorter packs in the warm-up: the switch changes the data too.
STAGES = (
    "stages=warmup",
    "stages.dense_warmup.seq_len=256",
    f"stages.dense_warmup.tokens={DENSE_STEPS * 2 * 256}",
    "stages.sparse.warmup_steps=2",
    # and the rotary embedding
    "stages.sparse.rope_theta=2000",
    "stages.sparse.rope_type=yarn",
    "stages.sparse.rope_factor=2",
    "stages.sparse.rope_original_length=256",
    "checkpoint.every=1",
    "train.validate_every=3",
)


def test_resume_around_a_switch_is_exact(tiny: tuple[str, ...], tmp_path: Path) -> None:
    settings = (*tiny, *STAGES)
    output = train(*settings, f"run_dir={tmp_path / 'whole'}", f"train.steps={STEPS}")
    dense, sparse = "attention dense, KL causal", "attention sparse, KL selected"
    roped = "RoPE yarn, theta 2000, factor 2, from 256 tokens"
    assert (
        f"stage dense_warmup: steps 1 to 5, 256 tokens per sequence, {dense}, RoPE default, theta 1000\n"
        in output
    )
    assert f"stage sparse: steps 6 to 9, 512 tokens per sequence, {sparse}, {roped}\n" in output
    want = read_metrics(tmp_path / "whole")
    for row in want:
        is_dense = row["step"] <= DENSE_STEPS
        assert row["stage"] == (0 if is_dense else 1)
        assert row["kl_loss"] > 0
        assert ("kv_selected_fraction_by_layer" not in row) is is_dense
        assert (row["kv_bytes"] == 0) is is_dense
    assert [row["tokens"] for row in want] == [512, 1024, 1536, 2048, 2560, 3584, 4608, 5632, 6656]
    assert want[DENSE_STEPS]["lr"] == want[DENSE_STEPS + 1]["lr"] / 2

    run_dir = tmp_path / "broken"
    for steps in (DENSE_STEPS, DENSE_STEPS + 1):
        train(*settings, f"run_dir={run_dir}", f"train.steps={steps}", "train.validate_every=0")
    with Training(*settings, f"run_dir={run_dir}", f"train.steps={STEPS}") as training:
        training.wait_for_step(run_dir, DENSE_STEPS + 2)
        training.kill()
    assert last_step(run_dir) < STEPS
    train(*settings, f"run_dir={run_dir}", f"train.steps={STEPS}")
    for ours, theirs in zip(read_metrics(run_dir), want, strict=True):
        extra = {"val_loss", "val_bits_per_byte"} - set(ours)
        expected = {key: value for key, value in without_times(theirs).items() if key not in extra}
        assert without_times(ours) == expected

    with Training(*settings, f"run_dir={run_dir}", "stages.dense_warmup.tokens=512") as training:
        assert training.end() == 2
        assert (
            "num_steps=5 in stage 1 (dense_warmup), now it is 1; change only stages from" in training.errors
        )


def test_full_attention_is_converted(tiny: tuple[str, ...], tmp_path: Path) -> None:
    """The frozen backbone computes what it did before; its index branch learns; then it trains sparsely."""
    full, converted = tmp_path / "full", tmp_path / "converted"
    train(*tiny, f"run_dir={full}", "train.steps=6", "model.layer_attention=full")
    settings = (
        *tiny,
        f"run_dir={converted}",
        f"checkpoint.load={full}",
        "checkpoint.load_weights_only=true",
        "stages=convert",
        f"stages.index_warmup.tokens={6 * 2 * 512}",
        "train.validate_every=1",
        "train.steps=8",
        "checkpoint.keep_last=1",
        *ONE_PROCESS,
    )
    output = train(*settings)
    # the end of the warm-up stays, as a model of its own
    store = CheckpointStore(converted)
    assert store.steps() == [6, 8]
    assert [read_meta(store.path(step))["ends_stage"] for step in store.steps()] == [True, False]
    assert f"starting from the weights of {full}/checkpoints/step_00000006\n" in output
    assert "it has no index branch in layers 2, 3: drawn anew\n" in output
    rows = read_metrics(converted)
    before = read_metrics(full)[-1]["val_loss"]
    for row in rows[:6]:
        assert abs(row["val_loss"] - before) < 1e-6 * before
        assert row["lr"] == 0.0
        assert row["index_lr"] > 0
    losses = [row["kl_loss"] for row in rows[:6]]
    assert losses[-1] < losses[0]
    assert rows[6]["lr"] > 0
    assert abs(rows[7]["val_loss"] - before) > 1e-4 * before


def test_other_model_is_still_refused(tiny: tuple[str, ...], tmp_path: Path) -> None:
    train(*tiny, f"run_dir={tmp_path / 'full'}", "train.steps=1", "model.layer_attention=full", *ONE_PROCESS)
    settings = (*tiny, f"run_dir={tmp_path / 'run'}", f"checkpoint.load={tmp_path / 'full'}")
    for wrong, text in (
        ((), "model.layer_attention=full*1,msa*2: checkpoint"),
        (("checkpoint.load_weights_only=true", "model.hidden_size=64"), "model.hidden_size=64: checkpoint"),
    ):
        with Training(*settings, *wrong) as training:
            assert training.end() == 2
            assert text in training.errors
