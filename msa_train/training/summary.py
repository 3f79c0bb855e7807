"""What is left at the end of a run: summary.json and a short table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msa_train.config import printable
from msa_train.training.checkpoint_files import write_json
from msa_train.training.metrics import json_ready

SUMMARY_NAME = "summary.json"


def write_summary(run_dir: str | Path, summary: Mapping[str, Any]) -> Path:
    """Write summary.json whole or not at all; numbers that are not finite are null and listed by name."""
    plain, nonfinite = json_ready(summary)
    if nonfinite:
        plain["nonfinite"] = nonfinite
    path = Path(run_dir).expanduser() / SUMMARY_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, plain)
    return path


def format_table(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values in two aligned columns; what a terminal would act on is escaped.

    Example: [("steps", "400"), ("final lm_loss", "2.31")] ->
        steps          400
        final lm_loss  2.31
    """
    shown = [(printable(name), printable(value)) for name, value in rows]
    width = max((len(name) for name, _ in shown), default=0)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in shown)
