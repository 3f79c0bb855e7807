"""Applies train.bad_step while a run goes on: judges steps before they are taken, and takes the run back."""

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from msa_train.config import BadStep, RunConfig, Stage, plan_stages, stage_at
from msa_train.parallel.fault_watch import watched
from msa_train.parallel.groups import Groups
from msa_train.training.bad_steps import BadSteps, EventLog, RollbackError
from msa_train.training.batch import StepBatch
from msa_train.training.checkpoint import load_newest, restore
from msa_train.training.checkpoint_store import CheckpointStore
from msa_train.training.divergence import (
    VALIDATION,
    SpoiltStateError,
    check_finite,
    diverged,
    not_finite,
)
from msa_train.training.engine import Accept, Engine, StepResult
from msa_train.training.together import together


@dataclass(slots=True)
class _Judged:
    loss: float = 0.0
    grad_norm: float = 0.0
    complaint: str = ""


class StepGuard:
    """Between the training loop and BadSteps; all ranks call it alike."""

    def __init__(self, config: RunConfig, groups: Groups, engine: Engine, store: CheckpointStore) -> None:
        self.config, self.groups, self.engine, self.store = config, groups, engine, store
        self.bad_steps = BadSteps(config.train)
        self._judged, self._events = _Judged(), EventLog(config.run_dir)
        self.notes: list[str] = []
        "what else to tell the user, emptied by who does"
        self._bad_values: list[str] = []

    @property
    def complaint(self) -> str:
        """What is wrong with the step that was judged last, empty if nothing is."""
        return self._judged.complaint

    def accept(self, batch: StepBatch) -> Accept | None:
        """What the engine asks before it takes the step; None where all steps are taken."""
        self._judged = _Judged()
        if not self.bad_steps.judges:
            return None

        def judge(result: StepResult) -> bool:
            counted = result.lm_loss_sum if self.engine.counts_loss() else 0.0
            kl_sum = sum(float(kl) for kl in result.stats.kl.values())
            total = torch.tensor([counted, kl_sum], dtype=torch.float64, device=self.groups.device)
            with watched("judge"):
                dist.all_reduce(total)
            loss_sum, kl = total.tolist()
            loss = loss_sum / batch.num_labels
            complaint = self.bad_steps.complaint(loss, result.grad_norm, kl)
            if complaint:
                complaint += self._where(result.bad_values)
            self._judged = _Judged(loss, result.grad_norm, complaint)
            return not complaint

        return judge

    def _where(self, bad_values: list[str]) -> str:
        """Where the first rank that knows met them; all ranks ask at once, and only in bad steps."""
        known = [found[0] for found in together(lambda: bad_values[:1], None) if found]
        return f" ({known[0]})" if known else ""

    def count(self, result: StepResult) -> dict[str, Any]:
        """Count the step that was just made or left out; what the metrics say about it."""
        self._bad_values = result.bad_values
        if not self.bad_steps.judges:
            return {}
        if not self._judged.complaint:
            self.bad_steps.take(self._judged.loss)
            return self.bad_steps.metrics()
        self.bad_steps.leave_out()
        return {"bad_step": 1, **self.bad_steps.metrics()}

    def conclude(self, step: int, values: dict[str, Any], first_pack: int) -> str:
        """What becomes of the run after a step.

        Args:
            step: made or left out; its metrics are written.
            values: its metrics.
            first_pack: number of its first pack.

        Returns:
            What to tell the user, if anything.

        Raises:
            DivergedError: if the run must end.
            RollbackError: if it shall go on from a checkpoint.
        """
        judged = self._judged
        if not judged.complaint:
            text = self._excused(step, values)
            if text:
                return text
            where = self._where(self._bad_values) if not_finite(values) else ""
            check_finite(step, values, self.store, where)
            return ""
        try:
            text = self.bad_steps.verdict(step, judged.complaint)
        except ValueError as error:
            raise diverged(step, str(error), self.store) from None
        last_pack = first_pack + self.config.train.global_batch_size - 1
        self._log(
            {"event": "skip", "step": step, "reason": judged.complaint, "packs": [first_pack, last_pack]}
        )
        return text

    def _excused(self, step: int, values: dict[str, Any]) -> str:
        """What to say where the validation loss alone is not finite, in a run that leaves bad steps out.

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
        saved = together(lambda: self.store.steps() if self.groups.rank == 0 else [], None)[0]
        later = {self.store.path(step): "later" for step in saved if step > bad.last_good}
        if len(later) == len(saved):
            raise diverged(bad.step, f"{bad.reason}; there is no checkpoint to go back to", self.store)
        found = load_newest(self.config, lambda found: restore(found, self.engine), known_damaged=later)
        assert found is not None, "the store has checkpoints"
        tokens = self._tokens(bad.step) - self._tokens(found.step)
        event = {"from_step": bad.step, "to_step": found.step, "tokens": tokens, "reason": bad.reason}
        self.bad_steps.go_back(found.meta.get("bad_steps", {}), event, tokens)
        self._log({"event": "rollback", **event})
        together(lambda: self.store.remove_after(found.step) if self.groups.rank == 0 else None, None)
        return found.step, (
            f"step {bad.step}: {bad.reason}: going back to step {found.step} and past {tokens} tokens"
        )

    def _tokens(self, step: int) -> int:
        """Tokens that `step` steps use, padding included."""
        stage: Stage = stage_at(plan_stages(self.config), max(step - 1, 0))
        return stage.tokens_at(step, self.config.train.global_batch_size)

    def _log(self, event: dict[str, Any]) -> None:
        if self.groups.rank == 0:
            note = self._events.write(event)
            self.notes += [note] if note else []
