"""Print rows for people: a line for each, every share with its interval."""

from collections.abc import Sequence

from msa_train.evaluation.intervals import share_text
from msa_train.evaluation.rows import Row

_HEADER = ("task", "length", "n", "hits", "token accuracy", "nats/token", "needle selected (best head)")


def table_lines(rows: Sequence[Row]) -> list[str]:
    """Write tasks as a table, losses by position and gains from context as a line each."""
    cells = [_HEADER, *(_cells(row) for row in rows if row["kind"] == "task")]
    lines: list[str] = []
    if len(cells) > 1:
        widths = [max(len(line[i]) for line in cells) for i in range(len(_HEADER))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ]
    for row in rows:
        if row["kind"] == "position_loss":
            parts = [f"{_tokens(2 ** int(k))} {loss:.3f}" for k, (_, loss) in row["loss_by_log2"].items()]
            lines.append(f"loss from position on: {', '.join(parts)}")
        elif row["kind"] == "context_gain":
            parts = [
                _context(int(context), one, is_first=not i)
                for i, (context, one) in enumerate(row["contexts"].items())
            ]
            lines.append(f"loss of the last {row['last_tokens']} tokens by context: {', '.join(parts)}")
    return lines


def _cells(row: Row) -> tuple[str, ...]:
    count = row["samples"]
    hits = share_text(row["hit_rate"], count) if "hit_rate" in row else "-"
    needle = "-"
    if "needle_rate" in row:
        mean, best = (share_text(row[f"needle_rate_{name}"], count) for name in ("mean", "best"))
        needle = f"{mean} ({best})"
    accuracy = share_text(row["token_accuracy"], count)
    return row["task"], str(row["length"]), str(count), hits, accuracy, f"{row['nll_per_token']:.3f}", needle


def _context(context: int, one: Row, *, is_first: bool) -> str:
    """Write the loss with a context, and the gain over the first one."""
    text = f"{_tokens(context)} {one['loss']:.3f}"
    if is_first or not one["gain_interval"]:
        return text
    low, high = one["gain_interval"]
    return f"{text} (gain {one['gain']:.3f} [{low:.3f}, {high:.3f}] of {one['documents']})"


def _tokens(number: int) -> str:
    """Write a number of tokens: 4096 -> "4K", 300 -> "300"."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if number >= size and number % size == 0:
            return f"{number // size}{unit}"
    return str(number)
