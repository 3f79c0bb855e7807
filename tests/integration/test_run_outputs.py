"""What a run leaves behind: metrics.jsonl, TensorBoard and summary.json, and that their numbers agree."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from msa_train.simulate.inputs.layouts import place
from msa_train.simulate.selections.recorded import read_selections
from msa_train.training.metrics.tensorboard import CHARTS
from msa_train.training.metrics.writer import read_metrics
from tests.helpers.training_command import (
    BLOCK_SIZE,
    GLOBAL_BATCH_SIZE,
    HEAD_DIM,
    LR,
    NUM_EXPERTS,
    NUM_KV_HEADS,
    PROBE_EVERY,
    ROUTER_TOPK,
    SEQ_LEN,
    SPARSE_LAYERS,
    WARMUP_STEPS,
    train,
)
from tests.integration.conftest import SELECTIONS_EVERY, STEPS, FinishedRun

CP_SIZE, FP32_BYTES = 2, 4
BIAS_UPDATE_RATE = 1e-3
POSITIONS = GLOBAL_BATCH_SIZE * SEQ_LEN
# keys and values of one block of one KV group
BLOCK_BYTES = 2 * HEAD_DIM * BLOCK_SIZE * FP32_BYTES
BLOCKS = SEQ_LEN // BLOCK_SIZE

SELECTED = "kv_selected_fraction_by_layer"
TAGS = {
    "loss/lm": "lm_loss",
    "loss/kl": "kl_loss",
    "loss/validation": "val_loss",
    "optim/grad_norm": "grad_norm",
    "optim/lr": "lr",
    "speed/tokens_per_s": "tokens_per_s",
    "data/tokens": "tokens",
    "data/padding_share": "padding_share",
    "moe/tokens_per_expert_min": "tokens_per_expert_min",
    "moe/tokens_per_expert_mean": "tokens_per_expert_mean",
    "moe/tokens_per_expert_max": "tokens_per_expert_max",
    "moe/router_bias_min": "router_bias_min",
    "moe/router_bias_max": "router_bias_max",
    "attention/block_recall": "block_recall",
    "attention/score_recall": "score_recall",
    "attention/score_recall_best": "score_recall_best",
    "attention/entropy": "attention_entropy",
    "exchange/f": "kv_selected_fraction",
    "exchange/kv_bytes": "kv_bytes",
    "exchange/exposed_s": "exposed_s",
    "exchange/kv_bytes_all_gather": "kv_bytes_all_gather",
    "exchange/index_query_bytes": "index_query_bytes",
    "exchange/full_query_bytes": "full_query_bytes",
    "memory/memory_gib": "memory_gib",
}
ALWAYS = {"step", "step_time_s", SELECTED, "kl_loss_by_layer", "kv_grad_bytes", *TAGS.values()} - {"val_loss"}
PROBED = {"block_recall", "score_recall", "score_recall_best", "attention_entropy"}
ALWAYS -= PROBED


@pytest.fixture(scope="module")
def rows(finished: FinishedRun) -> list[dict[str, Any]]:
    return read_metrics(finished.run_dir)


@pytest.fixture(scope="module")
def events(finished: FinishedRun) -> EventAccumulator:
    return EventAccumulator(str(finished.run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()


def test_every_step_has_its_keys(rows: list[dict[str, Any]]) -> None:
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert set(row) >= ALWAYS
        validated = row["step"] % 4 == 0 or row["step"] == STEPS
        assert PROBED.isdisjoint(row) == (row["step"] % PROBE_EVERY != 0)
        assert ("val_loss" in row) == ("val_bits_per_byte" in row) == validated
        assert row["tokens"] == row["step"] * POSITIONS
        assert row["lr"] == pytest.approx(LR * min(row["step"] / WARMUP_STEPS, 1))
        assert row["memory_gib"] > 0.05


def test_training_lowers_the_losses(rows: list[dict[str, Any]]) -> None:
    for name in ("lm_loss", "kl_loss", "val_loss"):
        values = [row[name] for row in rows if name in row]
        assert values[-1] < values[0] - 0.3, name
    # bytes are predicted, so a nat per token is 1 / ln 2 bits per byte, but for the ends of documents
    assert rows[-1]["val_bits_per_byte"] == pytest.approx(rows[-1]["val_loss"] / np.log(2), rel=0.02)


def test_sums_and_means_agree(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert set(row["kl_loss_by_layer"]) == set(row[SELECTED]) == set(SPARSE_LAYERS)
        assert row["kl_loss"] == pytest.approx(sum(row["kl_loss_by_layer"].values()))
        assert all(len(groups) == NUM_KV_HEADS for groups in row[SELECTED].values())
        assert row["kv_selected_fraction"] == pytest.approx(np.mean(list(row[SELECTED].values())))
        # every real token, and no padding, goes to ROUTER_TOPK experts
        real = row["tokens_per_expert_mean"] * NUM_EXPERTS / ROUTER_TOPK
        assert row["padding_share"] == pytest.approx(1 - real / POSITIONS)
        assert row["tokens_per_s"] * row["step_time_s"] == pytest.approx(real)
        assert row["tokens_per_expert_min"] == min(row["tokens_per_expert_min_by_layer"].values())
        assert row["tokens_per_expert_max"] == max(row["tokens_per_expert_max_by_layer"].values())
        assert row["tokens_per_expert_min"] < row["tokens_per_expert_mean"] < row["tokens_per_expert_max"]
        steps = row["step"] * BIAS_UPDATE_RATE * 1.001
        assert -steps <= row["router_bias_min"] < 0 < row["router_bias_max"] <= steps
    assert 0 < max(row["padding_share"] for row in rows) < 0.5


def test_selection_against_full_attention(rows: list[dict[str, Any]], events: EventAccumulator) -> None:
    probed = [row for row in rows if row["step"] % PROBE_EVERY == 0]
    for row in probed:
        for name in PROBED:
            by_layer = row[f"{name}_by_layer"]
            assert set(by_layer) == set(SPARSE_LAYERS)
            assert row[name] == pytest.approx(np.mean(list(by_layer.values())))
        # no selection covers more than the best blocks do
        assert 0 < row["block_recall"] < 1
        assert 0 < row["score_recall"] < row["score_recall_best"] < 1
        assert 0 < row["attention_entropy"] < np.log(SEQ_LEN)
        assert row["block_recall_by_distance"]["layer02"]["distance0"] in (None, 1.0)
    for layer in SPARSE_LAYERS:
        for group in range(NUM_KV_HEADS):
            recalls = [(row["step"], row["block_recall_by_layer"][layer][group]) for row in probed]
            _same(events, f"attention/block_recall_{layer}_group{group}", recalls)
    far = [(row["step"], row["score_recall_by_distance"]["layer03"]["distance4"]) for row in probed]
    kept = [(step, value) for step, value in far if value is not None]
    _same(events, "attention_distance/score_recall_layer03_distance4", kept)


def test_bytes_are_those_of_the_selected_blocks(rows: list[dict[str, Any]]) -> None:
    # each of the ranks lacks half of the blocks of each pack
    remote_blocks = GLOBAL_BATCH_SIZE * CP_SIZE * (BLOCKS - BLOCKS // CP_SIZE)
    for row in rows:
        selected = sum(f * remote_blocks for groups in row[SELECTED].values() for f in groups)
        assert selected == pytest.approx(round(selected))
        assert row["kv_bytes"] == pytest.approx(selected * BLOCK_BYTES)
        everything = remote_blocks * NUM_KV_HEADS * len(SPARSE_LAYERS) * BLOCK_BYTES
        assert row["kv_bytes_all_gather"] == everything
        assert 0 < row["kv_bytes"] < everything


def test_tensorboard_has_the_same_numbers(rows: list[dict[str, Any]], events: EventAccumulator) -> None:
    for tag, key in TAGS.items():
        _same(events, tag, [(row["step"], row[key]) for row in rows if key in row])
    for layer in SPARSE_LAYERS:
        _same(events, f"loss/kl_{layer}", [(row["step"], row["kl_loss_by_layer"][layer]) for row in rows])
        for end in ("min", "max"):
            counts = [(row["step"], row[f"tokens_per_expert_{end}_by_layer"][layer]) for row in rows]
            _same(events, f"moe/{layer}_tokens_per_expert_{end}", counts)
        for group in range(NUM_KV_HEADS):
            shares = [(row["step"], row[SELECTED][layer][group]) for row in rows]
            _same(events, f"exchange/f_{layer}_group{group}", shares)


def test_every_chart_finds_its_curves(events: EventAccumulator) -> None:
    tags = events.Tags()["scalars"]
    for charts in CHARTS.values():
        for title, (_, patterns) in charts.items():
            for pattern in patterns:
                assert any(re.search(pattern, tag) for tag in tags), f"{title}: {pattern}"


def test_summary_sums_up(finished: FinishedRun, rows: list[dict[str, Any]]) -> None:
    summary = json.loads((finished.run_dir / "summary.json").read_text())
    assert summary["steps"] == STEPS
    assert summary["tokens"] == STEPS * POSITIONS
    for name in ("lm_loss", "kl_loss", "val_loss", "val_bits_per_byte"):
        values = [row[name] for row in rows if name in row]
        assert (summary[f"{name}_first"], summary[f"{name}_last"]) == (values[0], values[-1])
    for name in ("kv_bytes", "kv_grad_bytes", "kv_bytes_all_gather", "index_key_bytes", "full_query_bytes"):
        assert summary[f"{name}_total"] == sum(row[name] for row in rows)
    assert summary["f_last"] == rows[-1][SELECTED]
    assert summary["tokens_per_s_median"] == np.median([row["tokens_per_s"] for row in rows])
    share = summary["kv_bytes_total"] / summary["kv_bytes_all_gather_total"]
    assert f"({share:.0%} of it moved)" in finished.output


@pytest.mark.parametrize("exchange", ["all_gather", "ring"])
def test_other_exchanges_move_everything_and_compute_the_same(
    finished: FinishedRun, rows: list[dict[str, Any]], tmp_path: Path, exchange: str
) -> None:
    train(*finished.settings, f"run_dir={tmp_path}", "train.steps=4", f"parallel.kv_exchange={exchange}")
    got = read_metrics(tmp_path)
    assert [row["step"] for row in got] == [1, 2, 3, 4]
    for ours, theirs in zip(got, rows[:4], strict=True):
        assert ours["kv_bytes"] == ours["kv_bytes_all_gather"] == theirs["kv_bytes_all_gather"]
        assert ours[SELECTED] == theirs[SELECTED]
        for name in ("lm_loss", "kl_loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-6), f"{name} of step {ours['step']}"
    assert got[-1]["val_loss"] == pytest.approx(rows[3]["val_loss"], rel=1e-6)


def _same(events: EventAccumulator, tag: str, want: list[tuple[int, float]]) -> None:
    # TensorBoard stores fp32
    assert [(event.step, event.value) for event in events.Scalars(tag)] == [
        (step, np.float32(value)) for step, value in want
    ], tag


def test_selections_are_recorded(finished: FinishedRun) -> None:
    """Of the step's first pack, by both ranks: f of a step lies between nothing and all of the other pack."""
    folder = finished.run_dir / "selections"
    assert [path.name for path in sorted(folder.iterdir())] == ["step_00000009", "step_00000018"]
    rows = read_metrics(finished.run_dir)
    for step in (SELECTIONS_EVERY, 2 * SELECTIONS_EVERY):
        layers = read_selections(folder / f"step_{step:08d}")
        assert [f"layer{layer.layer:02d}" for layer in layers] == list(SPARSE_LAYERS)
        for layer in layers:
            placement = place(
                "contiguous",
                seq_len=SEQ_LEN,
                block_size=BLOCK_SIZE,
                cp_size=CP_SIZE,
                cu_seqlens=layer.cu_seqlens,
            )
            remote = sum(
                layer.needed(placement, rank) & (placement.owner != rank) for rank in range(CP_SIZE)
            ).sum(axis=1)
            both_packs = (
                np.array(rows[step - 1][SELECTED][f"layer{layer.layer:02d}"]) * BLOCKS * GLOBAL_BATCH_SIZE
            )
            assert ((remote <= both_packs + 1e-6) & (both_packs <= remote + BLOCKS)).all()
