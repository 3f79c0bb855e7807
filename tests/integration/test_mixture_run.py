"""A run on a mixture in stages of two lengths: the same bits after a restart, the same data on any layout."""

import json
from pathlib import Path

import pytest

from msa_train.training.metrics.writer import read_metrics
from tests.helpers.training_command import train, without_times, write_corpus

STEPS = 6
DATA = ("tokens_by_source", "tokens_by_bucket", "tokens_by_source_bucket", "padding_share")


def test_restart_and_layout(tiny: tuple[str, ...], tmp_path: Path) -> None:
    write_corpus(tmp_path / "books")
    (tmp_path / "web.jsonl").write_text(
        "".join(json.dumps({"text": f"page {i} of the web " * (1 + i % 9)}) + "\n" for i in range(80))
    )
    settings = (
        *tiny,
        "stages=warmup",
        # two steps of 2 packs of 256 tokens, then packs of 512
        "stages.dense_warmup.tokens=1024",
        "stages.dense_warmup.seq_len=256",
        f"data.mixture.web.corpus={tmp_path / 'web.jsonl'}",
        f"data.mixture.books.corpus={tmp_path / 'books'}",
        "data.mixture.books.weight=2",
        "stages.sparse.mixture={web: 1, books: {under_8K: 3}}",
        "train.validate_every=3",
        "checkpoint.every=3",
    )
    whole, parts, other = (tmp_path / name for name in ("whole", "parts", "other"))
    train(*settings, f"run_dir={whole}", f"train.steps={STEPS}")
    rows = [without_times(row) for row in read_metrics(whole)]
    assert {name for row in rows for name, share in row["tokens_by_source"].items() if share} == {
        "web",
        "books",
    }
    assert all(sum(row["tokens_by_source"].values()) == pytest.approx(1) for row in rows)
    assert "val_loss" in rows[2]
    assert "val_bits_per_byte" not in rows[2]
    summary = json.loads((whole / "summary.json").read_text())
    assert set(summary["tokens_by_source_mean"]) == {"web", "books"}

    train(*settings, f"run_dir={parts}", "train.steps=3")
    train(*settings, f"run_dir={parts}", f"train.steps={STEPS}")
    assert [without_times(row) for row in read_metrics(parts)] == rows

    one = ("launcher.num_processes=1", "parallel.cp_size=1", "parallel.ep_size=1")
    train(*settings, *one, f"run_dir={other}", f"train.steps={STEPS}")
    for row, expected in zip(read_metrics(other), rows, strict=True):
        assert {key: row[key] for key in DATA} == {key: expected[key] for key in DATA}
        assert row["lm_loss"] == pytest.approx(expected["lm_loss"], rel=1e-4)

    deepspeed = ("engine=deepspeed", "deepspeed=zero1", f"run_dir={tmp_path / 'deepspeed'}")
    train(*settings, *deepspeed, f"train.steps={STEPS}")
    for row, expected in zip(read_metrics(tmp_path / "deepspeed"), rows, strict=True):
        assert {key: row[key] for key in DATA} == {key: expected[key] for key in DATA}
        assert row["lm_loss"] == pytest.approx(expected["lm_loss"], rel=1e-4)
