"""Declare every metric, once: what may stand in metrics.jsonl, and what follows from it.

TensorBoard's tags and charts, the line on the terminal, summary.json with its table, which traffic is counted
and docs/metrics.md are made from this. Their order is the order here; that of traffic is also the order in
which ranks add it up.
"""

from collections.abc import Mapping
from typing import Any

from msa_train.parallel.comm.purposes import POINTS
from msa_train.training.metrics.metric import Chart, InSummary, Metric, OverRanks, Parts

_same, _rank_0, _max = OverRanks.same, OverRanks.rank_0, OverRanks.max
_sum, _ratio, _mean = OverRanks.sum, OverRanks.ratio, OverRanks.mean
_LAYERS, _GROUPS, _DISTANCES, _PURPOSES = Parts.layers, Parts.groups, Parts.distances, Parts.purposes
_FIRST_AND_LAST, _LAST = InSummary.first_and_last, InSummary.last


def _traffic(key: str, *, chart: Chart | None = None, group: str = "exchange", part_of: str = "") -> Metric:
    """Declare the bytes of one purpose of `CpComm`, which the key names."""
    purpose = key.removesuffix("_bytes")
    return Metric(
        key,
        f"received for {POINTS[purpose]}",
        "bytes",
        _sum,
        f"{group}/{key}",
        chart=chart,
        purpose=purpose,
        part_of=part_of,
        in_summary=InSummary.total,
    )


# Rows that the formatter would pull apart: key, meaning, unit, over ranks, tag, parts, chart; then the rest.
# fmt: off
LINE = (
    Metric("step", "optimizer steps made or left out, this one included", "steps", _same, ""),
    Metric("nonfinite", "keys with a NaN or an infinity, which is null in this line", "", _rank_0, "",
           Parts.keys),
)
LOSSES = (
    Metric("lm_loss", "language-model loss of the step, mean over its tokens",
           "nats per token", _ratio, "loss/lm", chart=Chart.loss, line="lm_loss {:.4g}",
           in_summary=_FIRST_AND_LAST, title="training loss (nats)"),
    Metric("kl_loss", "how far the index branch is from the attention it should predict, summed over layers",
           "nats per token", _ratio, "loss/kl", chart=Chart.kl, line="kl {:.3g}",
           in_summary=_FIRST_AND_LAST, title="KL loss of the index branch"),
    Metric("kl_loss_by_layer", "the same of each layer",
           "nats per token", _ratio, "loss/kl_@", _LAYERS, Chart.kl),
    Metric("val_loss", "language-model loss of held-out documents, mean over their tokens",
           "nats per token", _ratio, "loss/validation", chart=Chart.loss, line="val_loss {:.4g}",
           in_summary=_FIRST_AND_LAST, title="validation loss (nats)"),
    Metric("val_bits_per_byte", "the same for each byte of text, which another tokenizer does not change",
           "bits per byte", _ratio, "loss/val_bits_per_byte",
           in_summary=_FIRST_AND_LAST, title="validation bits per byte"),
)
OPTIMIZER = (
    Metric("grad_norm", "global gradient norm before clipping", "", _same, "optim/grad_norm",
           chart=Chart.grad_norm, line="grad {:.2g}"),
    Metric("lr", "learning rate of the backbone", "", _same, "optim/lr", chart=Chart.lr, line="lr {:.1e}"),
    # tags below "other" are from before these had a group; dashboards name them
    Metric("index_lr", "learning rate of the index branch", "", _same, "other/index_lr"),
    Metric("stage", "number of the stage, from 0", "", _same, "other/stage"),
    Metric("bad_step", "1 where this step was left out (`train.bad_step`)", "", _same, "other/bad_step"),
    Metric("skipped_steps", "left out so far", "steps", _same, "optim/skipped_steps"),
    Metric("rollbacks", "ways back to a checkpoint so far", "", _same, "optim/rollbacks"),
    Metric("passed_over_tokens", "of packs that these ways back passed over, padding included",
           "tokens", _same, "data/passed_over_tokens"),
)
SPEED = (
    Metric("tokens_per_s", "real tokens of the step in each second",
           "tokens/s", _rank_0, "speed/tokens_per_s", chart=Chart.speed),
    Metric("step_time_s", "from the step's data to its metrics", "s", _rank_0, "speed/step_time_s"),
    Metric("tokens", "trained on so far, padding included", "tokens", _same, "data/tokens"),
    Metric("padding_share", "share of padding in the step's packs", "", _same, "data/padding_share",
           chart=Chart.padding, in_summary=InSummary.last_as_it_is),
    Metric("memory_gib", "memory of the largest process: of a GPU, the most that was allocated so far",
           "GiB", _max, "memory/memory_gib", chart=Chart.memory, in_summary=InSummary.last_as_it_is),
)
DATA = (
    Metric("tokens_by_bucket", "shares of the step's real tokens by the length of the whole document",
           "", _ratio, "data/bucket_@", Parts.shares, Chart.lengths, in_summary=InSummary.mean),
    Metric("tokens_by_source", "shares by source of `data.mixture`",
           "", _ratio, "data/source_@", Parts.shares, in_summary=InSummary.mean),
    Metric("tokens_by_source_bucket", "shares by both, as `books_8K-32K`; absent where 0",
           "", _ratio, "data/part_@", Parts.shares, in_summary=InSummary.mean),
    Metric("tokens_by_making", "shares by how `msa-data` made documents; absent if none",
           "", _ratio, "data/making_@", Parts.shares, in_summary=InSummary.mean),
)
SELECTION = (
    Metric("block_recall", "share of the `topk` blocks with most attention that were selected",
           "", _ratio, "attention/block_recall", chart=Chart.block_recall,
           in_summary=_FIRST_AND_LAST, title="block recall of the selection"),
    Metric("block_recall_by_layer", "the same of each layer and KV group",
           "", _ratio, "attention/block_recall_@", _GROUPS, Chart.block_recall),
    Metric("block_recall_by_distance", "the same of each layer, by where the blocks lie",
           "", _ratio, "attention_distance/block_recall_@", _DISTANCES, Chart.far_blocks),
    Metric("score_recall", "share of full attention that the selected blocks hold",
           "", _ratio, "attention/score_recall", chart=Chart.score_recall,
           in_summary=_FIRST_AND_LAST, title="attention mass it covers"),
    Metric("score_recall_by_layer", "the same of each layer and KV group",
           "", _ratio, "attention/score_recall_@", _GROUPS, Chart.score_recall),
    Metric("score_recall_by_distance", "of the attention that the best blocks hold, the selected ones' share",
           "", _ratio, "attention_distance/score_recall_@", _DISTANCES, Chart.far_scores),
    Metric("score_recall_best", "share of full attention that the best `topk` blocks would hold",
           "", _ratio, "attention/score_recall_best", chart=Chart.score_recall),
    Metric("score_recall_best_by_layer", "the same of each layer and KV group",
           "", _ratio, "attention/score_recall_best_@", _GROUPS, Chart.score_recall),
    Metric("attention_entropy", "entropy of full attention, mean over heads",
           "nats", _ratio, "attention/entropy", chart=Chart.entropy),
    Metric("attention_entropy_by_layer", "the same of each layer and KV group",
           "nats", _ratio, "attention/entropy_@", _GROUPS, Chart.entropy),
)
EXCHANGE = (
    Metric("kv_selected_fraction", "f: share of remote (block, KV group) pairs that a local query selected",
           "", _ratio, "exchange/f", chart=Chart.selected, in_summary=_LAST),
    Metric("kv_selected_fraction_by_layer", "the same of each layer and KV group",
           "", _ratio, "exchange/f_@", _GROUPS, Chart.selected, in_summary=_LAST),
    _traffic("kv_bytes", chart=Chart.bytes_moved),
    _traffic("kv_again_bytes"),
    _traffic("kv_grad_bytes"),
    _traffic("index_key_bytes"),
    _traffic("index_key_grad_bytes"),
    _traffic("index_query_bytes"),
    _traffic("request_bytes"),
    _traffic("full_kv_bytes"),
    _traffic("full_kv_again_bytes"),
    _traffic("full_kv_grad_bytes"),
    _traffic("full_query_bytes"),
    _traffic("full_query_grad_bytes"),
    _traffic("heads_bytes", group="other"),
    _traffic("heads_grad_bytes", group="other"),
    _traffic("kv_outer_bytes", part_of="kv_bytes"),
    _traffic("kv_again_outer_bytes", part_of="kv_again_bytes"),
    _traffic("kv_grad_outer_bytes", part_of="kv_grad_bytes"),
    _traffic("kv_hot_bytes", part_of="kv_bytes"),
    _traffic("kv_again_hot_bytes", part_of="kv_again_bytes"),
    _traffic("kv_grad_hot_bytes", part_of="kv_grad_bytes"),
    Metric("kv_bytes_all_gather", "`kv_bytes` if `msa` and `swa` layers gathered everything, each once",
           "bytes", _same, "exchange/kv_bytes_all_gather", chart=Chart.bytes_moved,
           in_summary=InSummary.total),
    Metric("exposed_s", "time of the step in which a rank could only wait for the exchange",
           "s", _mean, "exchange/exposed_s", chart=Chart.waits, in_summary=InSummary.total),
    Metric("exposed_s_by_purpose", "the same by what it waited for",
           "s", _mean, "exchange/exposed_s_@", _PURPOSES, Chart.waits, in_summary=_LAST),
    Metric("auto_selected", "share of calls for which `kv_exchange=auto` sent selected pairs",
           "", _ratio, "exchange/auto_selected"),
    Metric("auto_selected_by_layer", "the same of each layer",
           "", _ratio, "exchange/auto_selected_@", _LAYERS, in_summary=_LAST),
)
EXPERTS = (
    Metric("tokens_per_expert_max", "tokens of the busiest expert of all layers",
           "tokens", _sum, "moe/tokens_per_expert_max", chart=Chart.busiest),
    Metric("tokens_per_expert_max_by_layer", "the same of each layer",
           "tokens", _sum, "moe/@_tokens_per_expert_max", _LAYERS, Chart.busiest),
    Metric("tokens_per_expert_min", "tokens of the idlest expert of all layers",
           "tokens", _sum, "moe/tokens_per_expert_min", chart=Chart.idlest),
    Metric("tokens_per_expert_min_by_layer", "the same of each layer",
           "tokens", _sum, "moe/@_tokens_per_expert_min", _LAYERS, Chart.idlest),
    Metric("tokens_per_expert_mean", "mean over all experts", "tokens", _sum, "moe/tokens_per_expert_mean"),
    Metric("router_bias_min", "smallest bias of an expert", "", _rank_0, "moe/router_bias_min",
           chart=Chart.router_bias),
    Metric("router_bias_max", "largest bias of an expert", "", _rank_0, "moe/router_bias_max",
           chart=Chart.router_bias),
)
CHECKPOINTS = (
    Metric("checkpoint_step", "steps that it holds", "steps", _rank_0, "checkpoint/checkpoint_step"),
    Metric("checkpoint_pause_s", "training stood still for it",
           "s", _rank_0, "checkpoint/checkpoint_pause_s"),
    Metric("checkpoint_write_s", "from then until it was visible",
           "s", _rank_0, "checkpoint/checkpoint_write_s"),
    Metric("checkpoint_bytes", "its tensors, of all ranks", "bytes", _rank_0, "checkpoint/checkpoint_bytes"),
    Metric("checkpoint_failed_step", "steps that one would hold that could not be written",
           "steps", _rank_0, "checkpoint/checkpoint_failed_step"),
)
# fmt: on

METRICS = (*LINE, *LOSSES, *OPTIMIZER, *SPEED, *DATA, *SELECTION, *EXCHANGE, *EXPERTS, *CHECKPOINTS)

# Keys of files that an earlier version wrote
_RENAMED = {"f": "kv_selected_fraction_by_layer"}


def with_present_keys(row: Mapping[str, Any]) -> dict[str, Any]:
    """Put a line of metrics.jsonl of any version under the keys that are declared here."""
    present = {_RENAMED.get(key, key): value for key, value in row.items()}
    if "nonfinite" in present:
        present["nonfinite"] = [_RENAMED.get(key, key) for key in present["nonfinite"]]
    return present
