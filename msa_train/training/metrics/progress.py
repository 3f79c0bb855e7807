"""Show a run while it runs: a bar on a terminal, plain lines otherwise. Rank 0 only."""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from tqdm import tqdm

from msa_train.config import Progress as ProgressKind
from msa_train.config import printable
from msa_train.training.metrics.registry import METRICS

# no plain line sooner after the one before: logs of long runs stay readable
LINE_INTERVAL_S = 3.0
_BAR = "{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
# weight of the newest step in the seconds per step, so about the last ten decide
_SMOOTHING = 0.1


class Progress:
    """Report steps to a stream."""

    def __init__(
        self,
        kind: ProgressKind,
        total_steps: int,
        start_step: int,
        stream: TextIO,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin a report.

        Args:
            kind: bar, lines, or what suits the stream.
            total_steps: of the whole run.
            start_step: steps made before this start of the run.
            stream: where to.
            clock: tells seconds, for tests.
        """
        self.total_steps, self.stream, self._clock = total_steps, stream, clock
        as_bar = _can_hold_bar(stream) if kind is ProgressKind.auto else kind is ProgressKind.bar
        self._bar = (
            tqdm(total=total_steps, initial=start_step, file=stream, dynamic_ncols=True, bar_format=_BAR)
            if as_bar
            else None
        )
        self._last_line_s = float("-inf")
        self._unprinted = ""
        "the line of the last step, where it came too soon to be printed"
        self._seen: tuple[int, float] | None = None
        "step and time of the last report"
        self._step_s: float | None = None
        "seconds per step, smoothed"

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Report steps.

        Args:
            step: steps made.
            values: metrics of the last one, tokens_per_s among them; those with a `line` in the registry are
                shown.
        """
        self._time(step)
        parts = [
            metric.line.format(values[metric.key])
            for metric in METRICS
            if metric.line and values.get(metric.key) is not None
        ]
        speed = f"{format_count(values['tokens_per_s'])} tok/s"
        val_loss = values.get("val_loss")
        if self._bar is not None:
            # narrow terminals cut the end off
            self._bar.set_postfix_str("  ".join([speed, *parts]), refresh=False)
            self._bar.update(step - self._bar.n)
            if val_loss is not None:
                self.note(f"step {step}/{self.total_steps}  val_loss {val_loss:.4g}")
            return
        parts.append(speed)
        if self._step_s is not None and step < self.total_steps:
            parts.append(f"left {format_duration((self.total_steps - step) * self._step_s)}")
        self._unprinted = "  ".join([f"step {step}/{self.total_steps}", *parts])
        due = self._clock() - self._last_line_s >= LINE_INTERVAL_S
        if due or val_loss is not None or step >= self.total_steps:
            self._print_line()

    def note(self, text: str) -> None:
        """Print a line of its own, above the bar where there is one; names in it may hold anything."""
        if self._bar is not None:
            self._bar.write(printable(text), file=self.stream)
        else:
            print(printable(text), file=self.stream, flush=True)

    def close(self) -> None:
        """End the report; the last step is shown even if it came too soon after the one before."""
        if self._bar is not None:
            self._bar.close()
        elif self._unprinted:
            self._print_line()

    def _print_line(self) -> None:
        """Print the line that waits."""
        print(printable(self._unprinted), file=self.stream, flush=True)
        self._unprinted, self._last_line_s = "", self._clock()

    def _time(self, step: int) -> None:
        """Measure seconds per step, recent steps weighing more; the time before the first report is left out.

        Example: 2 s for the first step that counts, then 3 s -> 2.0, then 2.0 + 0.1 x (3 - 2) = 2.1.
        """
        now = self._clock()
        if self._seen is not None and step > self._seen[0]:
            latest = (now - self._seen[1]) / (step - self._seen[0])
            old = latest if self._step_s is None else self._step_s
            self._step_s = old + _SMOOTHING * (latest - old)
        self._seen = (step, now)


def _can_hold_bar(stream: TextIO) -> bool:
    """Tell whether it is a terminal that knows its size; containers may give 0 x 0, where no bar shows."""
    if not stream.isatty():
        return False
    try:
        return min(os.get_terminal_size(stream.fileno())) > 0
    except OSError:
        return True


def format_count(number: float) -> str:
    """Shorten a count: 950.2 -> 950, 8123 -> 8.1K, 1.25e6 -> 1.2M, 2e9 -> 2.0G."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= size * 0.9995:
            return f"{number / size:.1f}{letter}" if number < 99.95 * size else f"{number / size:.0f}{letter}"
    return f"{number:.0f}"


def format_duration(seconds: float) -> str:
    """Shorten a duration: 45 -> 45s, 220 -> 3m40s, 7500 -> 2h05m, 97200 -> 1d03h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    minutes = whole // 60
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = minutes // 60
    return f"{hours // 24}d{hours % 24:02d}h"
