"""Intervals, rows, table, picture and files of evaluations."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msa_train.config import DataConfig, EvaluationConfig, RunConfig, StageConfig, TrainConfig
from msa_train.config.evaluation.rules import check_evaluation
from msa_train.config.evaluation.settings import context_lengths, sample_lengths, task_names
from msa_train.evaluation.inputs import check_inputs
from msa_train.evaluation.intervals import mean_interval, share_text, wilson
from msa_train.evaluation.log import LOG_NAME, EvaluationLog, points, read_rows
from msa_train.evaluation.picture import colour, heat_map
from msa_train.evaluation.rows import context_row, depth_bin, position_row, task_row
from msa_train.evaluation.scoring.held_out import ContextLoss
from msa_train.evaluation.scoring.samples import SampleScore
from msa_train.evaluation.shared_samples import from_bytes, own_indices, share_samples, to_bytes
from msa_train.evaluation.table import table_lines
from msa_train.evaluation.tasks.sample import Needle, Sample


def sample(index: int, depth: float | None = 0.5, *, ordered: bool = True) -> Sample:
    return Sample(
        task="niah",
        length=64,
        index=index,
        prompt="",
        prefix=" A:",
        references=("x",),
        tokens=np.arange(60) + index,
        answers=((58, 60),),
        needles=(Needle(3, 5, 0),),
        depth=depth,
        ordered=ordered,
    )


def test_wilson() -> None:
    """Figures of the usual tables."""
    assert [round(value, 3) for value in wilson(8, 10)] == [0.490, 0.943]
    assert [round(value, 3) for value in wilson(10, 10)] == [0.722, 1.0]
    assert [round(value, 3) for value in wilson(0, 25)] == [0.0, 0.133]
    assert wilson(0, 0) == (0.0, 1.0)
    assert share_text(0.8, 10) == "0.80 [0.49, 0.94]"
    assert mean_interval([1.0, 3.0]) == pytest.approx((2.0, 1.96), abs=1e-4)
    assert mean_interval([1.0])[1] == math.inf


def test_row_of_a_task() -> None:
    samples = [sample(i, depth) for i, depth in enumerate((0.0, 0.48, 0.52, 1.0))]
    scores = [SampleScore(2, k, 0.5) for k in (2, 2, 1, 0)]
    row = task_row(samples, scores, {"layer02": [0.5, 1.0]}, 3)
    assert (row["hits"], row["hit_rate"]) == (2, 0.5)
    assert row["by_depth"] == {"0.00": [1, 1], "0.50": [1, 2], "1.00": [0, 1]}
    assert row["token_accuracy"] == 2.5 / 4
    assert (row["nll"], row["nll_per_token"]) == (0.5, 0.25)
    assert (row["needle_rate_mean"], row["needle_rate_best"]) == (0.75, 1.0)
    assert depth_bin(0.48, 5) == 0.5
    unordered = task_row([sample(0, ordered=False)], scores[:1], None, 3)
    assert "hit_rate" not in unordered
    assert "needle_rate" not in unordered


def rows(step: int = 4) -> list[dict[str, Any]]:
    scores = [SampleScore(2, 2, 0.5), SampleScore(2, 0, 0.5)]
    found = [
        task_row([sample(0, 0.0), sample(1, 1.0)], scores, {"layer02": [0.5]}, 2),
        position_row({0: (3, 2.0), 8: (100, 1.5)}, 512, 3),
        context_row([ContextLoss(128, 1, 2.0), ContextLoss(256, 2, 1.5, 0.5, 0.25)], 512, 64),
    ]
    return [row | {"step": step, "source": "training"} for row in found]


def test_every_share_of_the_table_has_an_interval() -> None:
    text = "\n".join(table_lines(rows()))
    assert "0.50 [0.09, 0.91]" in text
    assert "loss from position on: 1 2.000, 256 1.500" in text
    assert "128 2.000, 256 1.500 (gain 0.500 [0.250, 0.750] of 2)" in text


def test_points() -> None:
    tags = dict(point for row in rows() for point in points(row))
    assert tags["evaluation_hits/niah_64"] == 0.5
    assert tags["evaluation_position_loss/from_256"] == 1.5
    assert tags["evaluation_context_gain/context_256"] == 0.5


def test_picture() -> None:
    row = rows()[0]
    image = heat_map([row, {**row, "length": 128}])
    assert image is not None
    assert image.shape == (62, 62, 3)
    assert image[10, 10].tolist() == [26, 152, 80]
    assert image[40, 10].tolist() == [215, 48, 39]
    assert colour(0.5).tolist() == [254, 224, 139]
    assert heat_map([{"kind": "task", "length": 1}]) is None


def test_files(tmp_path: Path) -> None:
    log = EvaluationLog(tmp_path, tensorboard=False)
    for step in (2, 4):
        assert log.write(rows(step)) == []
    assert log.write([{**row, "source": "msa-eval"} for row in rows(9)]) == []
    with (tmp_path / LOG_NAME).open("a") as file:
        file.write('{"step": 5, "cut')
    log.forget_after(2)
    assert [(row["step"], row["source"]) for row in read_rows(tmp_path)] == [
        *[(2, "training")] * 3,
        *[(9, "msa-eval")] * 3,
    ]
    assert log.write([{"kind": "x", "step": 1, "value": math.nan}]) == []
    assert read_rows(tmp_path)[-1]["value"] is None
    (tmp_path / LOG_NAME).unlink()
    (tmp_path / LOG_NAME).symlink_to(tmp_path / "elsewhere")
    assert "is not followed" in log.write(rows())[0]
    assert not (tmp_path / "elsewhere").exists()


def test_samples_travel_whole() -> None:
    one = sample(3)
    other = from_bytes(to_bytes(one))
    assert np.array_equal(one.tokens, other.tokens)
    for name in ("task", "length", "index", "prefix", "references", "answers", "needles", "depth", "ordered"):
        assert getattr(one, name) == getattr(other, name)
    assert json.loads(to_bytes(one).split(b"\n")[0])["needles"] == [[3, 5, 0]]

    class Groups:
        rank, world_size = 1, 2

    assert own_indices(5, Groups()) == [1, 3]  # type: ignore[arg-type]


def test_lists_in_settings() -> None:
    settings = EvaluationConfig(tasks="vt, niah_multi*", lengths="8K, 4096,4K")
    assert task_names(settings) == (
        "niah_multikey_1",
        "niah_multikey_2",
        "niah_multikey_3",
        "niah_multivalue",
        "niah_multiquery",
        "vt",
    )
    assert sample_lengths(settings, 10) == (4096, 8192)
    assert sample_lengths(EvaluationConfig(), 10) == (10,)
    assert context_lengths(settings, 8192) == (768, 1536, 3072, 6144)
    assert "qa" not in task_names(EvaluationConfig(tasks="*"))
    assert "qa" in task_names(EvaluationConfig(tasks="qa*", questions="x"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lengths": "8193"},
            "evaluation.lengths=8193: is longer than the longest pack of the run, 8192 tokens",
        ),
        ({"lengths": "0"}, "evaluation.lengths=0: must be positive"),
        ({"lengths": "12x"}, "evaluation.lengths=12x: must be positive"),
        ({"lengths": "-5"}, "evaluation.lengths=-5: must be positive"),
        ({"lengths": "\u0663"}, "must be positive"),
        ({"tasks": "nia"}, "evaluation.tasks=nia: there is no such task; use some of niah_single_1"),
        ({"tasks": "qa"}, "evaluation.tasks=qa: needs the questions of a file"),
        ({"samples": 0}, "evaluation.samples=0: must be at least 1"),
        ({"samples": 10**6}, "evaluation.samples=1000000: must be at most"),
        ({"depths": 0}, "evaluation.depths=0: must be at least 1"),
        ({"every": -1}, "evaluation.every=-1: must not be negative"),
        ({"every": 1, "tasks": ""}, "evaluation.every=1: there is nothing to evaluate"),
        ({"held_out_packs": -1}, "evaluation.held_out_packs=-1: must not be negative"),
        ({"contexts": "7000", "last_tokens": 2000}, "evaluation.contexts=7000: does not fit"),
        ({"last_tokens": 8192}, "evaluation.last_tokens=8192: leaves no context"),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    config = RunConfig(evaluation=EvaluationConfig(**settings))
    with pytest.raises(ValueError) as error:
        check_evaluation(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_longest_stage_bounds_lengths_and_held_out_documents_are_needed() -> None:
    config = RunConfig(
        data=DataConfig(seq_len=4096),
        train=TrainConfig(steps=0),
        stages={"a": StageConfig(tokens=10), "b": StageConfig(tokens=10, seq_len=16_384)},
        evaluation=EvaluationConfig(lengths="16384"),
    )
    check_evaluation(config)
    config.data.validation_fraction, config.evaluation.held_out_packs = 0, 2
    with pytest.raises(ValueError, match=r"evaluation.held_out_packs=2: no document is held out"):
        check_evaluation(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": "128"}, "evaluation.lengths=128: is too short for niah_single_2, which needs at least"),
        ({"templates": "/nowhere"}, "evaluation.templates=/nowhere: has no scripts"),
        ({"haystack": "/nowhere"}, "evaluation.haystack=/nowhere: cannot be read"),
        ({"tasks": "qa", "questions": "/nowhere"}, "evaluation.questions=/nowhere: cannot be read"),
    ],
)
def test_bad_files_are_told_before_anything_starts(settings: dict[str, Any], message: str) -> None:
    config = RunConfig(evaluation=EvaluationConfig(**settings))
    with pytest.raises(ValueError) as error:
        check_inputs(config, lambda _line: None)
    assert message in str(error.value)


def test_tokenizer_with_more_words_than_the_model_is_refused() -> None:
    config = RunConfig()
    config.model.vocab_size = 100
    with pytest.raises(ValueError, match=r"data.tokenizer=bytes: has 257 words"):
        check_inputs(config, lambda _line: None)


def test_samples_that_do_not_fit_are_left_out() -> None:
    class Groups:
        rank, world_size = 0, 1

    shared = share_samples([sample(0), None, sample(2)], 3, Groups())  # type: ignore[arg-type]
    assert [one.index for one in shared] == [0, 2]
