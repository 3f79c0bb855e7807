"""Write rows to evaluation.jsonl and TensorBoard. Rank 0 only."""

import contextlib
import json
import math
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from msa_train.evaluation.picture import heat_map
from msa_train.evaluation.rows import Row
from msa_train.runtime.atomic_files import new_file, open_to_append

LOG_NAME, TENSORBOARD_NAME = "evaluation.jsonl", "tensorboard/evaluation"
TRAINING = "training"


class EvaluationLog:
    """Append to the results of a run."""

    def __init__(self, run_dir: str | Path, *, tensorboard: bool) -> None:
        self._folder, self._with_tensorboard = Path(run_dir).expanduser(), tensorboard

    def forget_after(self, step: int) -> None:
        """Drop rows that training wrote of later steps, which come again; rows of msa-eval stay."""
        path = self._folder / LOG_NAME
        # a full disk ends no training: then they stay, and the later of two rows of a step is the one
        with contextlib.suppress(OSError):
            rows = read_rows(path)
            kept = [row for row in rows if row.get("source") != TRAINING or row["step"] <= step]
            if len(kept) < len(rows):
                with new_file(path) as file:
                    file.writelines(_line(row) for row in kept)

    def write(self, rows: Sequence[Row]) -> list[str]:
        """Append rows, whole lines at once, and their points.

        Returns:
            A line for what could not be written: an evaluation ends no training.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with open_to_append(self._folder / LOG_NAME) as file:
                file.write("".join(map(_line, rows)))
            if self._with_tensorboard and rows:
                self._write_points(rows)
        except OSError as error:
            return [
                f"evaluation: {error.filename or self._folder}: {error.strerror}; results are on the terminal"
            ]
        return []

    def _write_points(self, rows: Sequence[Row]) -> None:
        # takes seconds to import
        from torch.utils.tensorboard import SummaryWriter

        # a name that nobody can have placed a link under
        writer: Any = SummaryWriter(
            str(self._folder / TENSORBOARD_NAME), filename_suffix=f".{secrets.token_hex(8)}"
        )
        step = rows[0]["step"]
        for row in rows:
            for tag, value in points(row):
                if math.isfinite(value):
                    writer.add_scalar(tag, value, step)
        for task in dict.fromkeys(row["task"] for row in rows if row["kind"] == "task"):
            image = heat_map([row for row in rows if row.get("task") == task])
            if image is not None:
                writer.add_image(f"evaluation/{task}", image, step, dataformats="HWC")
        writer.close()


def points(row: Row) -> Iterator[tuple[str, float]]:
    """Yield TensorBoard's tags and numbers of a row.

    Example: the hits of vt at 4,096 tokens are evaluation_hits/vt_4096.
    """
    if row["kind"] == "task":
        name = f"{row['task']}_{row['length']}"
        for tag, key in (
            ("hits", "hit_rate"),
            ("token_accuracy", "token_accuracy"),
            ("nll", "nll_per_token"),
            ("needle_selected", "needle_rate_mean"),
            ("needle_selected_best", "needle_rate_best"),
        ):
            if key in row:
                yield f"evaluation_{tag}/{name}", row[key]
    elif row["kind"] == "position_loss":
        for number, (_, loss) in row["loss_by_log2"].items():
            yield f"evaluation_position_loss/from_{2 ** int(number)}", loss
    else:
        for context, one in row["contexts"].items():
            yield f"evaluation_context_loss/context_{context}", one["loss"]
            yield f"evaluation_context_gain/context_{context}", one["gain"]


def read_rows(path: str | Path) -> list[Row]:
    """Read the rows of a run (its folder, or the file); lines cut short by a kill are left out.

    Raises:
        OSError: if it cannot be read.
    """
    path = Path(path)
    rows: list[Row] = []
    with (path / LOG_NAME if path.is_dir() else path).open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def _line(row: Row) -> str:
    """Write a row; a number that is not finite becomes null."""
    return json.dumps(_plain(row), allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
