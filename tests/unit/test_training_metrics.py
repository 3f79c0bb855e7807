"""metrics.jsonl, TensorBoard and the summary, written and read back."""

import errno
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG

from msa_train.training import metrics
from msa_train.training.metrics import MetricsWriter, json_ready, read_metrics, scalars
from msa_train.training.summary import format_table, write_summary


def test_tags_of_every_form_of_value() -> None:
    assert list(scalars("lm_loss", 2.5)) == [("loss/lm", 2.5)]
    assert list(scalars("kv_selected_fraction", 0.5)) == [("exchange/f", 0.5)]
    want = [("exchange/f_layer03_group0", 0.25), ("exchange/f_layer03_group1", 0.5)]
    assert list(scalars("f", {"layer03": [0.25, 0.5]})) == want
    assert list(scalars("f", [None, None, [0.25, 0.5]])) == want
    assert list(scalars("tokens_per_expert_max", [None, 7])) == [("moe/layer02_tokens_per_expert_max", 7.0)]
    by_layer = scalars("tokens_per_expert_max_by_layer", {"layer02": 7})
    assert list(by_layer) == [("moe/layer02_tokens_per_expert_max", 7.0)]
    assert list(scalars("tokens_per_expert_max", 9)) == [("moe/tokens_per_expert_max", 9.0)]
    assert list(scalars("kl_loss_by_layer", {"layer02": 0.1})) == [("loss/kl_layer02", 0.1)]
    by_distance = {"layer02": {"distance0": 1.0, "distance4": 0.5, "distance8": None}}
    assert list(scalars("block_recall_by_distance", by_distance)) == [
        ("attention_distance/block_recall_layer02_distance0", 1.0),
        ("attention_distance/block_recall_layer02_distance4", 0.5),
    ]
    assert list(scalars("block_recall", 0.5)) == [("attention/block_recall", 0.5)]
    assert list(scalars("lr", [0.1])) == [("optim/lr_layer01", 0.1)]
    assert list(scalars("memory_gib", 1.5)) == [("memory/memory_gib", 1.5)]
    assert list(scalars("temperature", [0.5])) == [("other/temperature_layer01", 0.5)]


def test_lines_hold_what_was_given(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "new", tensorboard=False, resume_step=0)
    writer.write(1, {"lm_loss": np.float32(0.5), "tokens": 7, "f": {"layer02": [0.0, torch.tensor(0.25)]}})
    writer.write(
        2, {"lm_loss": math.nan, "grad_norm": math.inf, "kl_loss": 0.25, "val": [1.0, -math.inf, None]}
    )
    assert read_metrics(tmp_path / "new") == [
        {"step": 1, "lm_loss": 0.5, "tokens": 7, "f": {"layer02": [0.0, 0.25]}},
        {
            "step": 2,
            "lm_loss": None,
            "grad_norm": None,
            "kl_loss": 0.25,
            "val": [1.0, None, None],
            "nonfinite": ["lm_loss", "grad_norm", "val"],
        },
    ]
    writer.close()
    assert not (tmp_path / "new" / "tensorboard").exists()
    strict = (tmp_path / "new" / "metrics.jsonl").read_text()
    assert "NaN" not in strict
    assert "Infinity" not in strict


def test_half_a_line_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "lm_loss": 2.0}\n{"step": 2, "lm_loss": 1.0}\n{"step": 3, "lm_l\xc3')
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2]
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_step=2)
    writer.write(3, {"lm_loss": 0.5})
    writer.close()
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_a_number_cut_short_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n12')
    assert read_metrics(path) == [{"step": 1}]


def test_resume_drops_later_steps_everywhere(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=True, resume_step=0)
    for step in range(1, 8):
        writer.write(step, {"lm_loss": float(step), "f": {"layer02": [0.5, step / 10]}})
    # no close: a killed process has none either
    resumed = MetricsWriter(tmp_path, tensorboard=True, resume_step=4)
    for step in range(5, 10):
        resumed.write(step, {"lm_loss": step + 0.5})
    resumed.close()
    losses = [(entry["step"], entry["lm_loss"]) for entry in read_metrics(tmp_path / "metrics.jsonl")]
    want = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 5.5), (6, 6.5), (7, 7.5), (8, 8.5), (9, 9.5)]
    assert losses == want
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/lm")] == want
    assert [event.step for event in events.Scalars("exchange/f_layer02_group1")] == [1, 2, 3, 4]


def test_restart_without_checkpoint_starts_over(tmp_path: Path) -> None:
    for _ in range(2):
        writer = MetricsWriter(tmp_path, tensorboard=True, resume_step=0)
        for step in (1, 2):
            writer.write(step, {"lm_loss": 1.0})
        writer.close()
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2]
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("loss/lm")] == [1, 2]


def full_disk(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_metrics_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_step=0)
    assert writer.write(1, {"lm_loss": 1.0}) == []
    with monkeypatch.context() as full:
        # there is room for some bytes of the second line
        full.setattr(
            metrics.os, "write", lambda file, data: write(file, data[:5]) if len(data) > 30 else full_disk()
        )
        (note,) = writer.write(2, {"lm_loss": 2.0})
        assert note.startswith(f"step 2: {tmp_path / 'metrics.jsonl'}: No space left on device; training")
        full.setattr(metrics.os, "write", full_disk)
        assert writer.write(3, {"lm_loss": 3.0}) == []
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    assert writer.write(4, {"lm_loss": 4.0}) == ["step 4: metrics.jsonl is written again"]
    writer.close()
    assert [row["lm_loss"] for row in read_metrics(tmp_path)] == [1.0, 2.0, 3.0, 4.0]


def test_a_full_disk_costs_points_of_tensorboard_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_TRY_AGAIN_AFTER", 2)
    writer = MetricsWriter(tmp_path, tensorboard=True, resume_step=0)
    writer.write(1, {"lm_loss": 1.0})
    monkeypatch.setattr(writer._tensorboard, "flush", full_disk)
    (note,) = writer.write(2, {"lm_loss": 2.0})
    assert note.startswith(f"step 2: {tmp_path / 'tensorboard'}: No space left on device; ")
    assert writer.write(3, {"lm_loss": 3.0}) == []
    assert writer.write(4, {"lm_loss": 4.0}) == ["step 4: tensorboard is written again"]
    monkeypatch.setattr(writer._tensorboard, "close", full_disk)
    writer.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert {event.step for event in events.Scalars("loss/lm")} >= {1, 4}


def test_the_custom_scalars_page_has_charts(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=True, resume_step=0)
    writer.write(1, {"lm_loss": 1.0})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    content = events.Tensors(CONFIG_SUMMARY_TAG)[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(content)  # type: ignore[attr-defined]
    assert [category.title for category in layout.category] == [
        "training",
        "key/value exchange",
        "selection against full attention",
        "experts",
        "machine",
    ]
    assert list(layout.category[0].chart[0].multiline.tag) == ["loss/lm$", "loss/validation$"]


def test_json_ready_looks_into_everything() -> None:
    plain, nonfinite = json_ready(
        {"a": {"b": [1.0, math.nan]}, "c": (1, 2), "d": "text", "e": True, "f": None}
    )
    assert plain == {"a": {"b": [1.0, None]}, "c": [1, 2], "d": "text", "e": True, "f": None}
    assert nonfinite == ["a"]


def test_summary_is_replaced_whole(tmp_path: Path) -> None:
    write_summary(tmp_path / "run", {"steps": 1})
    path = write_summary(tmp_path / "run", {"steps": 400, "lm_loss": 2.5, "val_loss": math.nan})
    assert json.loads(path.read_text()) == {
        "steps": 400,
        "lm_loss": 2.5,
        "val_loss": None,
        "nonfinite": ["val_loss"],
    }
    assert [entry.name for entry in path.parent.iterdir()] == ["summary.json"]


@pytest.mark.parametrize(
    ("rows", "want"),
    [([("steps", "400"), ("final lm_loss", "2.31")], "steps          400\nfinal lm_loss  2.31"), ([], "")],
)
def test_table(rows: list[tuple[str, str]], want: str) -> None:
    assert format_table(rows) == want


@pytest.mark.parametrize("is_full", [True, False])
def test_going_back_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_full: bool) -> None:
    """The line of step 3 is cut off by the full disk, those of 4 and 5 wait; the run goes back to 3."""
    write = os.write
    writer = MetricsWriter(tmp_path, tensorboard=True, resume_step=0)
    for step in (1, 2):
        writer.write(step, {"lm_loss": 1.0})
    with monkeypatch.context() as full:
        cut = [True]
        full.setattr(
            metrics.os, "write", lambda file, data: write(file, data[:5]) if cut.pop(0) else full_disk()
        )
        cut += [False, False, False, False]
        for step in (3, 4, 5):
            writer.write(step, {"lm_loss": 2.0})
        if is_full:
            full.setattr(metrics, "new_file", full_disk)
            full.setattr(MetricsWriter, "_new_tensorboard", full_disk)
        notes = writer.go_back(3)
        assert len(notes) == is_full
        assert not is_full or "tensorboard: No space left on device; its points are left out" in notes[0]
    writer.write(4, {"lm_loss": 3.0})
    writer.close()
    assert [(row["step"], row["lm_loss"]) for row in read_metrics(tmp_path)] == [
        (1, 1.0), (2, 1.0), (3, 2.0), (4, 3.0),
    ]  # fmt: skip
    assert "\n\n" not in (tmp_path / "metrics.jsonl").read_text()


def test_going_back_cuts_where_there_is_no_room_for_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_step=0)
    for step in range(1, 6):
        writer.write(step, {"lm_loss": 1.0})
    monkeypatch.setattr(metrics, "new_file", full_disk)
    assert writer.go_back(2) == []
    writer.write(3, {"lm_loss": 2.0})
    writer.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
