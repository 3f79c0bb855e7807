"""Sum up a run at its end: summary.json and a short table on the terminal. Rank 0 only."""

import math
from pathlib import Path
from typing import Any, TextIO

from msa_train.config import KvExchange, LrSchedule, RunConfig, plan_stages, printable, stage_at
from msa_train.config.lr_schedule import schedule_steps
from msa_train.parallel.process_groups import Groups
from msa_train.training.metrics.metric import InSummary
from msa_train.training.metrics.progress import format_count, format_duration
from msa_train.training.metrics.registry import METRICS
from msa_train.training.metrics.tables import format_table, write_summary
from msa_train.training.metrics.writer import METRICS_NAME, TENSORBOARD_NAME, read_metrics

# summary.json keeps the name that this had before its metric got another
_FIELDS = {"kv_selected_fraction_by_layer": "f"}


def report(
    config: RunConfig, groups: Groups, last: dict[str, Any], *, steps: int, seconds: float, stream: TextIO
) -> None:
    """Write summary.json and print the table.

    Args:
        config: the run.
        groups: sizes of the process groups.
        last: newest value of every metric in this start of the run; empty if there was nothing left to do.
        steps: updates made, over all starts; more than train.steps if that was lowered.
        seconds: wall time of this start.
        stream: where the table goes.
    """
    history = read_metrics(Path(config.run_dir) / METRICS_NAME)
    summary = _summary(config, groups, last, history, steps, seconds)
    try:
        path = str(write_summary(config.run_dir, summary))
    except OSError as error:
        path = f"could not be written: {error.strerror}"
    rows = [*_loss_rows(summary), *_exchange_rows(summary)]
    rows += [
        ("metrics", str(Path(config.run_dir) / METRICS_NAME)),
        ("summary", path),
    ]
    if config.logging.tensorboard:
        rows.append(("watch it", f"tensorboard --logdir {Path(config.run_dir) / TENSORBOARD_NAME}"))
    # run=NAME alone would not do: the other settings of the command line count too
    rows.append(("train on", f"the same command with {' '.join(train_on_settings(config, steps))}"))
    print(printable(f"\n{format_table(rows)}", keep="\n"), file=stream, flush=True)


def _summary(
    config: RunConfig,
    groups: Groups,
    last: dict[str, Any],
    history: list[dict[str, Any]],
    steps: int,
    seconds: float,
) -> dict[str, Any]:
    """Collect plain facts of the run; the history covers earlier starts too."""
    if not last:
        last = {key: value for row in history for key, value in row.items()}
    rates = sorted(row["tokens_per_s"] for row in history if row.get("tokens_per_s"))
    summary: dict[str, Any] = {
        "name": config.name,
        "steps": steps,
        "tokens": stage_at(plan_stages(config), max(steps - 1, 0)).tokens_at(steps),
        "seconds_this_start": seconds,
        "world_size": groups.world_size,
        "device": groups.device.type,
        "kv_exchange": config.parallel.kv_exchange.value,
        "cp_size": groups.cp_size,
        "ep_size": groups.ep_size,
        "dp_size": groups.dp_size,
        "tokens_per_s_median": rates[len(rates) // 2] if rates else None,
    }
    return summary | _from_metrics(last, history)


def _from_metrics(last: dict[str, Any], history: list[dict[str, Any]]) -> dict[str, Any]:
    """Keep what the registry declares of each metric."""
    summary: dict[str, Any] = {}
    for key in _keys_of(InSummary.first_and_last):
        values = [row[key] for row in history if row.get(key) is not None]
        if values:
            summary[f"{key}_first"], summary[f"{key}_last"] = values[0], values[-1]
    for key in _keys_of(InSummary.total):
        if key in last:
            summary[f"{key}_total"] = sum(row.get(key, 0) for row in history)
    # the median, as the first steps wait for connections and compilers
    waits = [
        row["exposed_s"] / row["step_time_s"]
        for row in history
        if row.get("step_time_s") and "exposed_s" in row
    ]
    if waits:
        summary["exposed_share_median"] = sorted(waits)[len(waits) // 2]
    for key in _keys_of(InSummary.last):
        if key in last:
            summary[f"{_FIELDS.get(key, key)}_last"] = last[key]
    for key in _keys_of(InSummary.mean):
        shares = _mean_shares([row[key] for row in history if isinstance(row.get(key), dict)])
        if shares:
            summary[f"{key}_mean"] = shares
    for key in _keys_of(InSummary.last_as_it_is):
        if key in last:
            summary[key] = last[key]
    return summary


def _mean_shares(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each share over the written steps; {"a": 1} and {"b": 1} -> 0.5 of either."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: sum(row.get(name, 0.0) for row in rows) / len(rows) for name in names}


def _keys_of(kind: InSummary) -> list[str]:
    """List the keys of which summary.json keeps this."""
    return [metric.key for metric in METRICS if metric.in_summary is kind]


def _loss_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Make the rows of steps, losses and speed."""
    rows = [("steps", f"{summary['steps']} ({format_count(summary['tokens'])} tokens)")]
    for metric in METRICS:
        if metric.title and f"{metric.key}_last" in summary:
            first, last = summary[f"{metric.key}_first"], summary[f"{metric.key}_last"]
            rows.append((metric.title, f"{first:.3f} -> {last:.3f}"))
    for key, title in (
        ("tokens_by_source", "tokens by source"),
        ("tokens_by_making", "by how made"),
    ):
        shares = summary.get(f"{key}_mean", {})
        if shares:
            rows.append((title, ", ".join(f"{name} {share:.1%}" for name, share in shares.items())))
    if summary["tokens_per_s_median"]:
        rate = f"{format_count(summary['tokens_per_s_median'])} tokens/s (median)"
        rows.append(("speed", f"{rate}, {format_duration(summary['seconds_this_start'])} this start"))
    return rows


def _exchange_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Make the rows of the exchange: bytes moved, against what the two gathering ways would have moved."""
    sent, gathered = summary.get("kv_bytes_total"), summary.get("kv_bytes_all_gather_total")
    if not gathered or sent is None:
        return []
    way = summary["kv_exchange"]
    rows = [(f"K/V moved forward, {way}", _size(sent))]
    if way in (KvExchange.selected.value, KvExchange.auto.value):
        share = f"{_size(gathered)} ({sent / gathered:.0%} of it moved)"
        rows.append(("  all-gather or ring would move", share))
    back = sum(summary.get(f"{name}_bytes_total", 0) for name in ("kv_grad", "kv_again"))
    rows.append(("K/V and gradients moved backward", _size(back)))
    rows.append(("index keys moved", _size(summary.get("index_key_bytes_total", 0))))
    if "kv_selected_fraction_last" in summary:
        rows.append(
            ("f, share of remote blocks selected", f"{summary['kv_selected_fraction_last']:.3f} at the end")
        )
    if "exposed_share_median" in summary:
        rows.append(
            ("time that a rank waits for them", f"{summary['exposed_share_median']:.1%} of a step (median)")
        )
    return rows


def _size(num_bytes: float) -> str:
    """Shorten a number of bytes: 1536 -> 1.5 KiB."""
    if num_bytes < 1:
        return "0 B"
    power = min(int(math.log(num_bytes, 1024)), 4)
    return f"{num_bytes / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def train_on_settings(config: RunConfig, steps: int) -> list[str]:
    """Return settings with which the same command trains as long again, at the learning rate it ended with.

    Args:
        config: the run that has ended.
        steps: updates made.
    """
    settings = [f"train.steps={2 * steps}"]
    stages = list(config.stages)
    if stages and config.stages[stages[-1]].tokens:
        settings.append(f"stages.{stages[-1]}.tokens=0")
    optim, length = config.optim, schedule_steps(config)
    # one that is not over yet, or stays at its height, needs nothing
    if optim.schedule is not LrSchedule.constant and optim.warmup_steps < length <= steps:
        settings.append(f"optim.schedule_steps={length}")
        if not optim.min_lr_ratio:
            settings.append("optim.min_lr_ratio=0.1")
    return settings
