"""Judge steps: a loss or gradient that is not finite, or a loss far above the recent ones, is not taken.

Such a step leaves weights, optimizer and router bias as they are; step and data move on, so which packs a
step has still follows from its number. After too many in a row a run may go back to its last checkpoint. It
then passes over all packs from there to the bad ones, so the packs of a step are shifted by a number that
every later checkpoint records. Everything here is equal on all ranks.

Example: spike_window=3, spike_factor=2, max_skipped=2, bad_step=rollback, losses from step 1 on

    3.0  2.9  3.1   taken; the median is 3.0
    6.5             left out, above 2 x 3.0
    2.8             taken; the median of 2.9, 3.1 and 2.8 is 2.9
    7.0  8.0        left out, above 2 x 2.9: two in a row, so the run goes back to step 5 or before
"""

import json
import math
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, NoReturn

from msa_train.config import BadStep, TrainConfig
from msa_train.runtime.atomic_files import is_full, open_to_append

LOG_NAME = "bad_steps.jsonl"


class RollbackError(Exception):
    """Ask the run to go on from its last checkpoint up to `last_good`, the last step that was taken."""

    def __init__(self, step: int, last_good: int, reason: str) -> None:
        super().__init__(f"step {step}: {reason}")
        self.step, self.last_good, self.reason = step, last_good, reason


class SkipPolicy:
    """Judge steps and remember those left out."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        # in_a_row: bad steps since the last one that was taken. skipped: all that lead to the present
        # weights. passed_over_tokens: of packs that the run jumped over when it went back, with padding.
        self.in_a_row = self.skipped = self.passed_over_tokens = 0
        self.rollbacks: list[dict[str, Any]] = []
        "events of all rollbacks, oldest first; plain JSON"
        # losses of steps that were taken: bad ones would raise the measure by which the next are judged
        self._recent: deque[float] = deque(maxlen=config.spike_window)

    @property
    def judges(self) -> bool:
        """Tell whether steps are judged before they are taken; it costs one all-reduce of 2 fp64."""
        return self.config.bad_step is not BadStep.end or self.config.spike_factor > 0

    def find_fault(self, loss: float, grad_norm: float, kl: float = 0.0) -> str:
        """Say what is wrong with a step, empty if nothing is.

        Args:
            loss: mean over all labels of the step, nats.
            grad_norm: global, before clipping.
            kl: of the index branches, any multiple of it; 0 in a step that does not form it.
        """
        bad = {"lm_loss": loss, "kl_loss": kl, "grad_norm": grad_norm}
        named = [f"{name}={value}" for name, value in bad.items() if not math.isfinite(value)]
        if named:
            return f"{', '.join(named)}: not finite"
        # Not before the window is full: the first losses of a run fall too fast to be a measure. The median,
        # as one high loss that was taken moves it little.
        factor, full = self.config.spike_factor, len(self._recent) == self.config.spike_window
        if factor > 0 and full and loss > factor * (usual := median(self._recent)):
            return (
                f"lm_loss={loss:.4g}: above train.spike_factor={factor:g} times {usual:.4g}, the median of "
                f"the last {len(self._recent)} steps"
            )
        return ""

    def record_taken(self, loss: float) -> None:
        """Record that a step is taken; loss: as `find_fault` saw it."""
        self.in_a_row = 0
        if self.config.spike_factor > 0:
            self._recent.append(loss)

    def record_skipped(self) -> None:
        """Record that a step is not taken."""
        self.in_a_row += 1
        self.skipped += 1

    def decide(self, step: int, reason: str) -> str:
        """Decide what becomes of the run after a step was left out.

        Args:
            step: that was left out, already recorded.
            reason: as `find_fault` said.

        Returns:
            What to tell the user.

        Raises:
            RollbackError: if the run shall go on from its last checkpoint.
            ValueError: in one line, why the run must end.
        """
        config = self.config
        if config.bad_step is BadStep.end:
            raise ValueError(reason)
        if self.in_a_row < config.max_skipped:
            return f"step {step} is left out ({reason})"
        text = f"{reason}; {self.in_a_row} steps in a row are bad (train.max_skipped={config.max_skipped})"
        if config.bad_step is BadStep.skip:
            raise ValueError(text)
        self._check_rollbacks(text)
        reason = f"{reason}; {self.in_a_row} bad steps in a row"
        raise RollbackError(step, step - self.in_a_row, reason)

    def spoilt(self, step: int, reason: str) -> NoReturn:
        """Decide what becomes of the run where its state is not finite after a step: no skipping mends that.

        Raises:
            RollbackError: if the run shall go on from its last checkpoint.
            ValueError: in one line, why the run must end.
        """
        if self.config.bad_step is not BadStep.rollback:
            raise ValueError(reason)
        self._check_rollbacks(reason)
        raise RollbackError(step, step - 1, reason)

    def _check_rollbacks(self, text: str) -> None:
        """End a run that has gone back too often: it may go round in circles for days."""
        if len(self.rollbacks) >= self.config.max_rollbacks:
            raise ValueError(f"{text} after {len(self.rollbacks)} rollbacks (train.max_rollbacks)")

    def new_stage(self) -> None:
        """Forget recent losses: those of another stage say nothing about this one's."""
        self._recent.clear()

    def go_back(self, recorded: Mapping[str, Any], event: dict[str, Any], tokens: int) -> None:
        """Go on from a checkpoint, past the packs that led to the bad steps.

        Counts of steps are the checkpoint's again; what was passed over and rolled back is the run's history
        and adds up.

        Example: one pack of 128 tokens per step, back from step 7 to the checkpoint of step 4: 384 tokens are
        passed over. Step 5, which had pack 4, now has pack 7, the first one after those of step 7.

        Args:
            recorded: `record` of that checkpoint.
            event: the rollback, plain JSON.
            tokens: of the packs between the checkpoint and the bad step, that one's included.
        """
        passed_over, rollbacks = self.passed_over_tokens + tokens, [*self.rollbacks, event]
        self.restore(recorded)
        self.in_a_row, self.passed_over_tokens, self.rollbacks = 0, passed_over, rollbacks

    def record(self) -> dict[str, Any]:
        """Return what meta.json keeps of it; plain JSON."""
        return {
            "in_a_row": self.in_a_row,
            "skipped": self.skipped,
            "passed_over_tokens": self.passed_over_tokens,
            "rollbacks": self.rollbacks,
            "recent_losses": list(self._recent),
        }

    def restore(self, recorded: Mapping[str, Any]) -> None:
        """Go on from a `record`; from an empty one where the checkpoint is older than this."""
        self.in_a_row = recorded.get("in_a_row", 0)
        self.skipped = recorded.get("skipped", 0)
        self.passed_over_tokens = recorded.get("passed_over_tokens", 0)
        self.rollbacks = list(recorded.get("rollbacks", []))
        self._recent.clear()
        self._recent.extend(recorded.get("recent_losses", []))

    def metrics(self) -> dict[str, float]:
        """Return sums over the run for the metrics; nothing where steps are not judged."""
        if not self.judges:
            return {}
        return {
            "skipped_steps": self.skipped,
            "rollbacks": len(self.rollbacks),
            "passed_over_tokens": self.passed_over_tokens,
        }


class EventLog:
    """Append to run_dir/bad_steps.jsonl, which nothing shortens; lines wait for a full disk. Rank 0."""

    def __init__(self, run_dir: str | Path) -> None:
        self._path, self._waiting = Path(run_dir).expanduser() / LOG_NAME, b""

    def write(self, event: Mapping[str, Any]) -> str:
        """Append a line, after those that wait.

        Returns:
            What to tell the user, once: that lines have to wait; else nothing.

        Raises:
            OSError: if the file cannot be written for another reason than a full disk.
        """
        had_to_wait = bool(self._waiting)
        self._waiting += json.dumps(event).encode() + b"\n"
        try:
            with open_to_append(self._path) as file:
                while self._waiting:
                    # a line that is cut off goes on where it was cut
                    self._waiting = self._waiting[os.write(file.fileno(), self._waiting) :]
        except OSError as error:
            if not is_full(error):
                raise
            if not had_to_wait:
                later = "training goes on, its lines are written when they can be"
                return f"{self._path}: {error.strerror}; {later}"
        return ""
