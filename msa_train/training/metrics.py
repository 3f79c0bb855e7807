"""metrics.jsonl and TensorBoard. Rank 0 only.

A value is a number; or a dict by layer, {"layer03": entry}; or a list with an entry for each layer, None
where the layer has no such value. An entry is a number, a list with a number for each KV group or a dict of
named numbers. Layers count from 1, groups from 0.
"""

import json
import math
import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msa_train.files import is_full, new_file, open_to_append

METRICS_NAME, TENSORBOARD_NAME = "metrics.jsonl", "tensorboard"

# TensorBoard tags; @ is where "layer03" or "layer03_group1" goes, and vanishes for a single number.
TAGS = {
    "lm_loss": "loss/lm",
    "kl_loss": "loss/kl_@",
    "val_loss": "loss/validation",
    "lr": "optim/lr",
    "grad_norm": "optim/grad_norm",
    "tokens": "data/tokens",
    "padding_share": "data/padding_share",
    "tokens_per_s": "speed/tokens_per_s",
    "step_time_s": "speed/step_time_s",
    "kv_selected_fraction": "exchange/f_@",
    "f": "exchange/f_@",
    "exposed_s": "exchange/exposed_s_@",
    "auto_selected": "exchange/auto_selected_@",
    "tokens_per_expert_min": "moe/@_tokens_per_expert_min",
    "tokens_per_expert_mean": "moe/@_tokens_per_expert_mean",
    "tokens_per_expert_max": "moe/@_tokens_per_expert_max",
    "router_bias_min": "moe/@_router_bias_min",
    "router_bias_max": "moe/@_router_bias_max",
    "block_recall": "attention/block_recall_@",
    "score_recall": "attention/score_recall_@",
    "score_recall_best": "attention/score_recall_best_@",
    "attention_entropy": "attention/entropy_@",
    "block_recall_by_distance": "attention_distance/block_recall_@",
    "score_recall_by_distance": "attention_distance/score_recall_@",
}
# Groups of keys without a tag of their own, by how the key starts
_GROUPS = {
    "memory": "memory",
    "val_": "loss",
    "kv_": "exchange",
    "full_kv_": "exchange",
    "full_query_": "exchange",
    "index_key_": "exchange",
    "index_query_": "exchange",
    "request_": "exchange",
    "router": "moe",
    "tokens_per_expert": "moe",
    "padding": "data",
    "checkpoint": "checkpoint",
    "skipped": "optim",
    "rollbacks": "optim",
    "passed_over": "data",
}
_OTHER = "other"

# Charts of the Custom Scalars page; tags are regular expressions.
CHARTS = {
    "training": {
        "loss": ["Multiline", ["loss/lm$", "loss/validation$"]],
        "KL loss of the index branch": ["Multiline", ["loss/kl"]],
        "gradient norm": ["Multiline", ["optim/grad_norm$"]],
        "learning rate": ["Multiline", ["optim/lr$"]],
        "tokens per second": ["Multiline", ["speed/tokens_per_s$"]],
        "padding": ["Multiline", ["data/padding_share$"]],
    },
    "key/value exchange": {
        "f: share of remote blocks selected, per layer and group": ["Multiline", ["exchange/f(_|$)"]],
        "bytes moved, and what an all-gather would move": ["Multiline", ["exchange/kv_bytes"]],
        "seconds that a rank waits, by purpose": ["Multiline", ["exchange/exposed_s"]],
    },
    "selection against full attention": {
        "block recall": ["Multiline", ["attention/block_recall(_layer|$)"]],
        "score recall, and that of the best blocks": [
            "Multiline",
            ["attention/score_recall(_best)?(_layer|$)"],
        ],
        "attention entropy (nats)": ["Multiline", ["attention/entropy(_layer|$)"]],
        "block recall by distance in blocks": ["Multiline", ["attention_distance/block_recall"]],
        "score recall of the best blocks by distance": ["Multiline", ["attention_distance/score_recall"]],
    },
    "experts": {
        "tokens of the busiest expert, per layer": ["Multiline", ["moe/.*tokens_per_expert_max$"]],
        "tokens of the idlest expert, per layer": ["Multiline", ["moe/.*tokens_per_expert_min$"]],
        "router bias, per layer": ["Multiline", ["moe/.*router_bias_(min|max)$"]],
    },
    "machine": {"memory": ["Multiline", ["memory/.*"]]},
}


# of lines that wait for space on the disk; what comes after these is not kept
_MAX_WAITING_BYTES = 2**26
# written steps after which a TensorBoard file that could not be written is followed by another
_TRY_AGAIN_AFTER = 100


class MetricsWriter:
    """Appends to the metrics of a run, after dropping what a killed run wrote beyond its last checkpoint.

    A full disk does not end a run: lines wait in memory until they can be written, and TensorBoard's points
    are left out until then.
    """

    def __init__(self, run_dir: str | Path, *, tensorboard: bool, resume_step: int) -> None:
        folder = Path(run_dir).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._with_tensorboard = folder, tensorboard
        self._waiting, self._writes, self._try_again = b"", 0, 0
        # of the first line that waits: what is written already
        self._cut = b""
        self._open(resume_step)

    def _open(self, resume_step: int) -> None:
        path = self._folder / METRICS_NAME
        if path.exists():
            _drop_after(path, resume_step)
        self._file, self._tensorboard = open_to_append(path), None
        if self._with_tensorboard:
            self._tensorboard: Any = self._new_tensorboard(resume_step + 1)

    def _new_tensorboard(self, first_step: int) -> Any:
        # takes seconds to import
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _quiet_about_disks
        writer = SummaryWriter(
            str(self._folder / TENSORBOARD_NAME),
            purge_step=first_step,
            # a name that nobody can have placed a link under
            filename_suffix=f".{secrets.token_hex(8)}",
        )
        writer.add_custom_scalars(CHARTS)
        return writer

    def go_back(self, step: int) -> list[str]:
        """Drop what comes after a step, from which the run goes on in another way; on a full disk too.

        Returns:
            As `write`.
        """
        self._flush()
        lines = (self._cut + self._waiting).splitlines(keepends=True)
        if self._cut:
            os.ftruncate(self._file.fileno(), os.fstat(self._file.fileno()).st_size - len(self._cut))
        self._cut = b""
        self._waiting = b"".join(line for line in lines if json.loads(line)["step"] <= step)
        self._close_files()
        try:
            self._open(step)
        except OSError as error:
            if not is_full(error) or self._file.closed:
                raise
            return [self._without_points(step, error)]
        return []

    def write(self, step: int, values: Mapping[str, Any]) -> list[str]:
        """Add one step.

        Args:
            step: optimizer steps made; greater than in earlier calls.
            values: numbers and lists by name, see the module. Not-a-number and infinity become null in
                metrics.jsonl and their names are listed under "nonfinite".

        Returns:
            What to tell the user: where something could not be written, and where it can be again.
        """
        self._writes += 1
        return [*self._write_line(step, values), *self._write_points(step, values)]

    def _write_line(self, step: int, values: Mapping[str, Any]) -> list[str]:
        plain, nonfinite = json_ready(values)
        line = {"step": step, **plain, **({"nonfinite": nonfinite} if nonfinite else {})}
        had_to_wait = bool(self._waiting)
        if len(self._waiting) < _MAX_WAITING_BYTES:
            self._waiting += json.dumps(line, allow_nan=False).encode() + b"\n"
        error = self._flush()
        if error is not None:
            path = self._folder / METRICS_NAME
            later = "training goes on, and they are written when they can be"
            return [] if had_to_wait else [f"step {step}: {path}: {error.strerror}; {later}"]
        return [f"step {step}: {METRICS_NAME} is written again"] if had_to_wait else []

    def _flush(self) -> OSError | None:
        """Write what waits, as much as there is room for; says what kept it."""
        try:
            while self._waiting:
                # no buffer between: a line that is cut off goes on where it was cut
                count = os.write(self._file.fileno(), self._waiting)
                written, self._waiting = self._cut + self._waiting[:count], self._waiting[count:]
                self._cut = written[written.rfind(b"\n") + 1 :]
        except OSError as error:
            return error
        return None

    def _write_points(self, step: int, values: Mapping[str, Any]) -> list[str]:
        if not self._with_tensorboard or (self._tensorboard is None and self._writes < self._try_again):
            return []
        is_new = self._tensorboard is None
        try:
            writer = self._tensorboard = self._tensorboard or self._new_tensorboard(step)
            for key, value in values.items():
                for tag, number in scalars(key, value):
                    writer.add_scalar(tag, number, step)
            # a kill -9 must not cost points that the checkpoint already covers
            writer.flush()
        except OSError as error:
            text = self._without_points(step, error)
            return [] if is_new else [text]
        return [f"step {step}: {TENSORBOARD_NAME} is written again"] if is_new else []

    def _without_points(self, step: int, error: OSError) -> str:
        # its thread has ended, so this file is over
        self._tensorboard, self._try_again = None, self._writes + _TRY_AGAIN_AFTER
        path, left = self._folder / TENSORBOARD_NAME, f"its points are left out, {METRICS_NAME} has them"
        return f"step {step}: {path}: {error.strerror}; {left}"

    def close(self) -> None:
        """Finish both files, as far as the disk allows."""
        self._flush()
        self._close_files()

    def _close_files(self) -> None:
        self._file.close()
        try:
            if self._tensorboard is not None:
                self._tensorboard.close()
        except OSError:
            pass


def _quiet_about_disks(thread: threading.ExceptHookArgs) -> None:
    """TensorBoard's thread prints a traceback where it cannot write; `write` says that in a line."""
    if not (isinstance(thread.exc_value, OSError) and type(thread.thread).__name__ == "_AsyncWriterThread"):
        threading.__excepthook__(thread)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Steps of a metrics.jsonl (or of the run_dir that holds it); lines cut short by a kill are left out."""
    path = Path(path)
    return [entry for _, entry in _entries(path / METRICS_NAME if path.is_dir() else path)]


def scalars(key: str, value: Any) -> Iterator[tuple[str, float]]:
    """TensorBoard tags and numbers of one value.

    Example: f={"layer03": [0.1, 0.2]}, or f=[None, None, [0.1, 0.2]] -> exchange/f_layer03_group0 0.1 and
    exchange/f_layer03_group1 0.2. block_recall_by_distance={"layer03": {"distance4": 0.5}} ->
    attention_distance/block_recall_layer03_distance4 0.5.
    """
    if isinstance(value, list | tuple):
        value = {f"layer{index + 1:02d}": entry for index, entry in enumerate(value)}
    entries = value.items() if isinstance(value, Mapping) else [("", value)]
    for name, entry in entries:
        if isinstance(entry, list | tuple):
            numbers = [(f"{name}_group{group}", number) for group, number in enumerate(entry)]
        elif isinstance(entry, Mapping):
            numbers = [(f"{name}_{part}", number) for part, number in entry.items()]
        else:
            numbers = [(name, entry)]
        for index, number in numbers:
            if number is not None and not isinstance(number, str):
                yield _tag(key, index), float(number)


def json_ready(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Values as plain JSON, and the keys under which a number was not finite (and is null)."""
    plain = {key: _plain(value) for key, value in values.items()}
    return plain, [key for key, value in values.items() if not _is_finite(value)]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    # also the scalars of NumPy and torch
    number = value.item() if hasattr(value, "item") else float(value)
    return None if isinstance(number, float) and not math.isfinite(number) else number


def _is_finite(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_finite(entry) for entry in value.values())
    if isinstance(value, list | tuple):
        return all(_is_finite(entry) for entry in value)
    return value is None or isinstance(value, str) or math.isfinite(value)


def _tag(key: str, index: str) -> str:
    key = key.removesuffix("_by_layer").removesuffix("_by_purpose")
    tag = TAGS.get(key)
    if tag is None:
        group = next((group for start, group in _GROUPS.items() if key.startswith(start)), _OTHER)
        tag = f"{group}/{key}_@"
    if index:
        return tag.replace("@", index) if "@" in tag else f"{tag}_{index}"
    return tag.replace("_@", "").replace("@_", "")


def _drop_after(path: Path, resume_step: int) -> None:
    """Keep whole lines up to resume_step; the file is replaced at once, or cut where two have no room."""
    try:
        with new_file(path) as file:
            for line, entry in _entries(path):
                if entry["step"] <= resume_step:
                    file.write(line + "\n")
    except OSError as error:
        if not is_full(error):
            raise
        _cut_after(path, resume_step)


def _cut_after(path: Path, resume_step: int) -> None:
    """As `_drop_after`, without room on the disk; damaged lines further up stay, which readers leave out."""
    end = place = 0
    with path.open("rb") as lines:
        for line in lines:
            place += len(line)
            if line.endswith(b"\n") and any(
                entry["step"] <= resume_step for entry in _parsed(line.decode(errors="replace"))
            ):
                end = place
    with open_to_append(path) as file:
        file.truncate(end)


def _entries(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            for entry in _parsed(line):
                yield line.rstrip("\n"), entry


def _parsed(line: str) -> list[dict[str, Any]]:
    """The entry of a line; none where it is damaged."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return []
    return [entry] if isinstance(entry, dict) and isinstance(entry.get("step"), int) else []
