"""Apply train.bad_step while a run goes on: judge steps before they are taken, and take the run back.

In the order of a step:

    gate         hands the engine a function `judge`
    judge        called after the gradients are summed, before the update: exchanges loss and KL loss, asks
                 SkipPolicy; what it answers decides whether there is an update
    record       counts the step
    outcome      taken, skipped, or taken and not finite
    after_step   goes on, asks to go back (RollbackError), or ends the run (DivergedError)
    go_back      loads the checkpoint to go on from

A step is judged before the update, since an update cannot be taken back: it changes weights and moments in
place, and one gradient that is not finite spoils all of them. The answer is the same on all ranks, which have
the same exchanged sums and the same gradient norm; ranks that answered differently would have other weights.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from msa_train.checkpoint.all_ranks import run_on_all_ranks
from msa_train.checkpoint.load import load_newest
from msa_train.checkpoint.store import CheckpointStore
from msa_train.checkpoint.torch_dist.finite_state import SpoiltStateError, diverged
from msa_train.config import BadStep, RunConfig, Stage, plan_stages, stage_at
from msa_train.parallel.comm.fault_watch import watched
from msa_train.parallel.process_groups import Groups
from msa_train.training.engines.engine import Accept, StepResult, TrainEngine
from msa_train.training.resume import restore
from msa_train.training.stability.finite_check import VALIDATION, check_finite, not_finite
from msa_train.training.stability.skip_policy import EventLog, RollbackError, SkipPolicy
from msa_train.training.step_batch import StepBatch


@dataclass(slots=True)
class _Judged:
    """Hold what was found about the step that was judged last."""

    loss: float = 0.0
    "mean over all labels of the step, nats"
    grad_norm: float = 0.0
    "global, before clipping"
    complaint: str = ""
    "what is wrong with it; empty if nothing is, or it was not judged"


class StepOutcome(Enum):
    """Say what became of a step."""

    taken = auto()
    "as nearly all are"
    skipped = auto()
    "judged bad and left out"
    not_finite = auto()
    "taken, and a loss or the gradient is not finite"


class StepGuard:
    """Stand between the training loop and SkipPolicy; all ranks call it alike."""

    def __init__(
        self, config: RunConfig, groups: Groups, engine: TrainEngine, store: CheckpointStore
    ) -> None:
        self.config, self.groups, self.engine, self.store = config, groups, engine, store
        self.bad_steps = SkipPolicy(config.train)
        self._judged, self._events = _Judged(), EventLog(config.run_dir)
        self.notes: list[str] = []
        "what else to tell the user, emptied by who does"
        self._bad_values: list[str] = []
        "where this rank met values that are not finite in the last step, first one first"

    @property
    def complaint(self) -> str:
        """Return what is wrong with the step that was judged last, empty if nothing is."""
        return self._judged.complaint

    def gate(self, batch: StepBatch) -> Accept | None:
        """Make what the engine asks before it takes the step; None where all steps are taken.

        Args:
            batch: the step's packs and global counts.
        """
        self._judged = _Judged()
        # nothing is exchanged then; what is not finite ends the run after the step, before a save
        if not self.bad_steps.judges:
            return None

        def judge(result: StepResult) -> bool:
            counted = result.lm_loss_sum if self.engine.counts_loss() else 0.0
            kl_sum = sum(float(kl) for kl in result.stats.kl.values())
            # 16 bytes over all ranks. The KL sum keeps the ranks' factors: only whether it is finite matters.
            # A step whose metrics are not written forms none, and has its gradient's norm alone.
            total = torch.tensor([counted, kl_sum], dtype=torch.float64, device=self.groups.device)
            with watched("judge"):
                dist.all_reduce(total)
            loss_sum, kl = total.tolist()
            # sums over all ranks, so divided once by the labels of all ranks
            loss = loss_sum / batch.num_labels
            complaint = self.bad_steps.find_fault(loss, result.grad_norm, kl)
            if complaint:
                complaint += self._where(result.counters.bad_values)
            self._judged = _Judged(loss, result.grad_norm, complaint)
            return not complaint

        return judge

    def _where(self, bad_values: list[str]) -> str:
        """Say where the first rank that knows met them; all ranks ask at once, and only in bad steps."""
        known = [found[0] for found in run_on_all_ranks(lambda: bad_values[:1], None) if found]
        return f" ({known[0]})" if known else ""

    def record(self, result: StepResult) -> dict[str, Any]:
        """Count the step that was just made or left out; return what the metrics say about it."""
        self._bad_values = result.counters.bad_values
        if not self.bad_steps.judges:
            return {}
        if not self._judged.complaint:
            self.bad_steps.record_taken(self._judged.loss)
            return self.bad_steps.metrics()
        self.bad_steps.record_skipped()
        return {"bad_step": 1, **self.bad_steps.metrics()}

    def outcome(self, values: dict[str, Any]) -> StepOutcome:
        """Tell what became of the step that was judged last; values: its metrics."""
        if self._judged.complaint:
            return StepOutcome.skipped
        return StepOutcome.not_finite if not_finite(values) else StepOutcome.taken

    def after_step(self, step: int, values: dict[str, Any], packs: range) -> str:
        """Decide what becomes of the run after a step.

        Args:
            step: made or left out; its metrics are written.
            values: its metrics.
            packs: numbers of its packs.

        Returns:
            What to tell the user, if anything.

        Raises:
            DivergedError: if the run must end.
            RollbackError: if it shall go on from a checkpoint.
        """
        judged, outcome = self._judged, self.outcome(values)
        if outcome is not StepOutcome.skipped:
            text = self._excused(step, values)
            if text:
                return text
            where = self._where(self._bad_values) if outcome is StepOutcome.not_finite else ""
            check_finite(step, values, self.store, where)
            return ""
        try:
            text = self.bad_steps.decide(step, judged.complaint)
        except ValueError as error:
            raise diverged(step, str(error), self.store) from None
        numbers = [packs.start, packs.stop - 1]
        self._log({"event": "skip", "step": step, "reason": judged.complaint, "packs": numbers})
        return text

    def _excused(self, step: int, values: dict[str, Any]) -> str:
        """Say that the validation loss alone is not finite, in a run that leaves bad steps out; else nothing.

        Nothing is trained on it, the steps are judged by losses of their own, and weights before every save.
        """
        policy, bad = self.config.train.bad_step, not_finite(values)
        if policy is BadStep.end or not bad or not bad[0].startswith(f"{VALIDATION}="):
            return ""
        reason = f"{bad[0]}: not finite"
        self._log({"event": "validation", "step": step, "reason": reason})
        return f"step {step}: {reason}; training goes on, by train.bad_step={policy.value}"

    def spoilt(self, step: int, error: SpoiltStateError) -> NoReturn:
        """Go back, or end, where weights or moments are found to be not finite before a save.

        Raises:
            RollbackError: if the run shall go on from a checkpoint.
            DivergedError: if it must end.
        """
        try:
            self.bad_steps.spoilt(step, error.reason)
        except ValueError as reason:
            raise diverged(step, str(reason), self.store) from None

    def go_back(self, bad: RollbackError) -> tuple[int, str]:
        """Load the newest sound checkpoint from before the bad steps and remove later ones.

        Returns:
            Its step, and what to tell the user.

        Raises:
            DivergedError: if there is none.
        """
        # rank 0 looks for all: to others a folder may show a moment later, and all must load the same
        saved = run_on_all_ranks(lambda: self.store.steps() if self.groups.rank == 0 else [], None)[0]
        later = {self.store.path(step): "later" for step in saved if step > bad.last_good}
        if len(later) == len(saved):
            raise diverged(bad.step, f"{bad.reason}; there is no checkpoint to go back to", self.store)
        # Later ones were saved among the bad steps or after them. They stay until an older one is loaded: if
        # none can be, the user still has all of them.
        found = load_newest(self.config, lambda found: restore(found, self.engine), known_damaged=later)
        assert found is not None, "the store has checkpoints"
        tokens = self._tokens(bad.step) - self._tokens(found.step)
        event = {"from_step": bad.step, "to_step": found.step, "tokens": tokens, "reason": bad.reason}
        self.bad_steps.go_back(found.meta.get("bad_steps", {}), event, tokens)
        self._log({"event": "rollback", **event})
        run_on_all_ranks(lambda: self.store.remove_after(found.step) if self.groups.rank == 0 else None, None)
        return found.step, (
            f"step {bad.step}: {bad.reason}: going back to step {found.step} and past {tokens} tokens"
        )

    def _tokens(self, step: int) -> int:
        """Count the tokens that `step` steps use, padding included."""
        stage: Stage = stage_at(plan_stages(self.config), max(step - 1, 0))
        return stage.tokens_at(step)

    def _log(self, event: dict[str, Any]) -> None:
        """Append an event to bad_steps.jsonl, on rank 0."""
        if self.groups.rank == 0:
            note = self._events.write(event)
            self.notes += [note] if note else []
