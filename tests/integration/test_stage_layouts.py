"""Stages of other layouts through the real command: the run goes on by itself, and after any kill."""

from pathlib import Path

from msa_train.checkpoint.manifest import read_meta
from msa_train.runtime.next_stage import MARK_NAME
from msa_train.training.metrics.writer import read_metrics
from tests.helpers.training_command import Training, last_step, train, without_times

FIRST_STEPS, STEPS = 4, 8
# two ranks: cp 2, ep 2, then dp 2; shorter packs and fewer blocks before, a batch of its own after
STAGES = (
    "stages=warmup",
    "stages.dense_warmup.attention=sparse",
    "stages.dense_warmup.seq_len=256",
    "stages.dense_warmup.topk=3",
    f"stages.dense_warmup.tokens={FIRST_STEPS * 2 * 256}",
    "stages.sparse.global_batch_size=4",
    "stages.sparse.warmup_steps=2",
    "stages.sparse.alternate.every=3",
    "stages.sparse.alternate.seq_len=128",
    "checkpoint.every=2",
    "train.validate_every=0",
    "logging.attention_every=0",
    f"train.steps={STEPS}",
)
LAYOUT = ("stages.sparse.parallel.cp_size=1", "stages.sparse.parallel.ep_size=1")
# another layout adds up in another order; rounding decides between blocks of nearly the same score
ROUNDING = {"lm_loss": 1e-6, "grad_norm": 1e-5, "kl_loss": 1e-4}


def test_a_run_moves_from_layout_to_layout(tiny: tuple[str, ...], tmp_path: Path) -> None:
    settings = (*tiny, *STAGES, *LAYOUT)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    output = train(*settings, f"run_dir={whole}")
    assert (
        "stage dense_warmup: dp 1 x cp 2 x tp 1 x pp 1, ep 2, in processes of their own from step 1" in output
    )
    assert "step 4 is saved: stage sparse goes on in processes of its own\n" in output
    assert "going on from step 4\n" in output
    assert "(cp 1, ep 1, dp 2)" in output
    want = read_metrics(whole)
    assert [row["step"] for row in want] == list(range(1, STEPS + 1))
    assert [row["tokens"] for row in want] == [512, 1024, 1536, 2048, 4096, 6144, 8192, 10240]
    layouts = [read_meta(whole / f"checkpoints/step_{n:08d}")["layout"]["cp_size"] for n in (6, 8)]
    assert layouts == [1, 1]

    # in the first stage, between the two, and in the second
    with Training(*settings, f"run_dir={broken}") as training:
        training.wait_for_step(broken, 2)
        training.kill()
    with Training(*settings, f"run_dir={broken}") as training:
        training.wait_until((broken / MARK_NAME).exists, "the end of the first stage")
        training.kill()
    assert last_step(broken) == FIRST_STEPS
    with Training(*settings, f"run_dir={broken}") as training:
        training.wait_for_step(broken, FIRST_STEPS + 2)
        training.kill()
    train(*settings, f"run_dir={broken}")
    assert [without_times(row) for row in read_metrics(broken)] == [without_times(row) for row in want]

    # one layout for all, and another engine, whose shards of states change with the layout
    train(*tiny, *STAGES, f"run_dir={tmp_path / 'same'}")
    train(*settings, "engine=deepspeed", "deepspeed=zero2", f"run_dir={tmp_path / 'zero2'}")
    for name in ("same", "zero2"):
        for ours, theirs in zip(read_metrics(tmp_path / name), want, strict=True):
            assert ours["tokens"] == theirs["tokens"]
            for key, tolerance in ROUNDING.items():
                assert abs(ours[key] - theirs[key]) <= tolerance * abs(theirs[key]), (name, ours["step"], key)

    with Training(*settings, f"run_dir={broken}", "stages.sparse.parallel.cp_size=3", "--check") as training:
        assert training.end() == 2
        assert "(in stages.sparse)" in training.errors or "stages.sparse." in training.errors
