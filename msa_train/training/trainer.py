"""Run the training loop: steps, validation, checkpoints, metrics.

One turn of `Trainer._run`, on every rank alike:

    _step           packs of this rank by number; `make_batch` counts labels over all ranks; `_train`
      _train        engine.train_step: forward, backward, gradients summed; `guard.gate` judges; update
      guard.record  counts the step as taken or left out
      metrics       gathered over all ranks, in steps that are shown, probed, bad or not finite
      validate      where it is due
    _report         rank 0 writes metrics.jsonl, TensorBoard and the terminal
    saver.finished  the outcome of a save that goes on beside the training
    _conclude       guard.after_step: go on, raise RollbackError (`_go_back`, then the loop anew) or end
    between         evaluations, where they are due; the training goes on as if there had been none
    save            where it is due and no bad step came last
    _stops          all ranks agree whether one was asked to stop

Steps count from 1: step n follows n - 1 updates, and a checkpoint of step n is taken after it. Packs and
learning rates follow from the number alone. Decisions are made from numbers that are equal on all ranks, or
exchanged first: ranks that decided on their own would meet in different collectives.
"""

import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from msa_train.checkpoint.data_record import DataRecord
from msa_train.checkpoint.save import WAITS_FOR_OTHERS, CheckpointSaver, SaveReport
from msa_train.checkpoint.store import CheckpointStore
from msa_train.checkpoint.torch_dist.finite_state import SpoiltStateError, diverged
from msa_train.config import RunConfig, Stage, StageAttention, plan_stages, stage_at, total_steps
from msa_train.config.lr_schedule import LearningRates, stage_rates
from msa_train.config.staging.notes import stage_note
from msa_train.config.staging.views import layout_config
from msa_train.data import Corpus, PackedDataset
from msa_train.data.mixture.packs import MixedPacks
from msa_train.data.mixture.stages import MixedStages
from msa_train.parallel.comm.fault_watch import own_standing, tell_others, watched
from msa_train.parallel.process_groups import Groups
from msa_train.runtime import preemption
from msa_train.runtime.fencing import own_token
from msa_train.runtime.last_words import record
from msa_train.runtime.watchdog import Watchdog
from msa_train.training.checkpoint_meta import checkpoint_meta
from msa_train.training.engines.engine import StepResult, TrainEngine
from msa_train.training.metrics.collect import StepMetrics, router_bias_range
from msa_train.training.metrics.progress import Progress
from msa_train.training.metrics.selection_recording import SelectionLog
from msa_train.training.metrics.writer import MetricsWriter
from msa_train.training.stability.skip_policy import RollbackError
from msa_train.training.stability.step_guard import StepGuard, StepOutcome
from msa_train.training.stage_packs import StagePacks, StageStream
from msa_train.training.step_batch import StepBatch, make_batch
from msa_train.training.validation import validate

BetweenSteps = Callable[[int, Stage], None]
"takes the updates made and the stage they belong to; all ranks call it alike"


@dataclass(slots=True)
class Data:
    """Hold what is trained and validated on."""

    train: dict[int, PackedDataset]
    "packs by their length in tokens, in which stages may differ"
    validation: Mapping[int, PackedDataset | MixedPacks | None]
    "held-out packs by the same lengths; None where nothing is held out"
    corpus: Corpus
    "the documents that all of these are cut from"
    record: DataRecord
    "kept in every checkpoint"
    mixed: MixedStages | None = None
    "of a run with a mixture, in place of `train`"


@dataclass(slots=True)
class Reporting:
    """Hold where progress goes; only on rank 0."""

    writer: MetricsWriter
    "metrics.jsonl and TensorBoard"
    progress: Progress
    "the terminal"


class Trainer:
    """Run the steps of all stages that are not yet made."""

    def __init__(
        self,
        config: RunConfig,
        groups: Groups,
        engine: TrainEngine,
        data: Data,
        store: CheckpointStore,
        reporting: Reporting | None,
    ) -> None:
        self.config, self.groups, self.engine, self.data = config, groups, engine, data
        self.store, self.reporting = store, reporting
        self.stages, self.total_steps = plan_stages(config), total_steps(config)
        self.packs = StagePacks(config, data.train, data.mixed)
        self.next_stage: Stage | None = None
        "set if the run ended here as the next step is for processes of another layout"
        self.metrics = StepMetrics(config, groups)
        self.saver = CheckpointSaver(store, config.checkpoint, make_buffer=engine.make_staging)
        self._save_metrics: dict[str, float] = {}
        "of the save that has ended, for the next row that is written"
        self.guard = StepGuard(config, groups, engine, store)
        self.bad_steps = self.guard.bad_steps
        self._last_steps = {self.total_steps} | {
            stage.last_step
            for stage, following in pairwise(self.stages)
            if self._is_ours(stage) and not self._is_ours(following)
        }
        "steps with which the work of these processes is over, in a stage or in the run"
        self._stage_ends = {self.total_steps} | {stage.last_step for stage in self.stages}
        self._owes_save = False
        "a save is due that bad steps have put off"
        self.watchdog = Watchdog(
            config.watchdog.timeout_s, f"rank {groups.rank}", stands_at=self._stands_at, tell=_tell_stalled
        )
        # a step of many packs may take longer than the watchdog waits
        engine.forward.on_pack = lambda: self.watchdog.beat(f"a pack of step {self._step_number} began")
        self._step_number = 0
        self.between: BetweenSteps | None = None
        "called between a step's report and its save; what it does must change nothing of the training"
        self.stopped: preemption.StopRecord | None = None
        "set if a signal ended the run before its last step"

    def run(self, first_step: int, after_step: Callable[[int], None] | None = None) -> dict[str, Any]:
        """Train to the end, or until a signal asks to stop. All ranks call it.

        Args:
            first_step: updates already made.
            after_step: called with the step number after each step, for tests.

        Returns:
            The last value seen of every metric, by key.

        Raises:
            DivergedError: if the run must not go on, by train.bad_step.
            CheckpointError: if a save failed, where on_failure=end or it had to succeed.
        """
        last: dict[str, Any] = {}
        try:
            with self.watchdog:
                while True:
                    try:
                        self._run(first_step, last, after_step)
                        break
                    except RollbackError as bad:
                        first_step = self._go_back(bad)
                self._tell_saved(self.saver.wait())
            return last
        finally:
            self.saver.close()

    def _run(self, first_step: int, last: dict[str, Any], after_step: Callable[[int], None] | None) -> None:
        """Make the steps after `first_step`, stage by stage; `last` takes up the metrics.

        Ends early before a stage for which other processes are to begin.
        """
        for stage in self.stages:
            begin, end = max(first_step, stage.first_step), min(stage.last_step, self.total_steps)
            if begin >= end:
                continue
            if not self._is_ours(stage):
                self.next_stage = stage
                return
            self._enter(stage, begin)
            with self.packs.open(stage, self.bad_steps.rollbacks) as stream:
                for step in range(begin + 1, end + 1):
                    values = self._step(step, stage, stream)
                    last |= values
                    self._report(step, values)
                    self._tell_saved(self.saver.finished())
                    # after the report, so that metrics.jsonl has the step that ends a run or takes it back
                    self._conclude(step, stream, values)
                    self.watchdog.beat(f"step {step}")
                    if self.between is not None:
                        self.between(step, stage)
                    saved = self._may_save(step)
                    if saved:
                        self.save(step, wait=step in self._last_steps)
                    if after_step is not None:
                        after_step(step)
                    if self._stops(step, saved=saved):
                        return

    def _conclude(self, step: int, stream: StageStream, values: dict[str, Any]) -> None:
        """Go on, go back or end, see StepGuard.after_step."""
        if self.guard.outcome(values) is not StepOutcome.taken:
            # the checkpoint that is under way may be the one to go on from
            self._tell_saved(self.saver.wait())
        text = self.guard.after_step(step, values, stream.numbers(step - 1))
        if text:
            self._note(text)
        self._tell_guard()

    def _tell_guard(self) -> None:
        """Print what the guard has to say."""
        notes, self.guard.notes = self.guard.notes, []
        for note in notes:
            self._note(note)

    def _go_back(self, bad: RollbackError) -> int:
        """Take the run back to a checkpoint; return the step that it goes on from."""
        step, text = self.guard.go_back(bad)
        if not self._is_ours(stage_at(self.stages, step)):
            # the rollback is known to these processes alone, until they save
            reason = f"{bad.reason}; the checkpoint of step {step} is of a stage with another layout"
            raise diverged(bad.step, f"{reason}, and a run does not go back across layouts", self.store)
        self._owes_save = False
        notes = [] if self.reporting is None else self.reporting.writer.go_back(step)
        for note in (text, *notes):
            self._note(note)
        self._tell_guard()
        return step

    def _note(self, text: str) -> None:
        """Print a line, on rank 0."""
        if self.reporting is not None:
            self.reporting.progress.note(text)

    def _may_save(self, step: int) -> bool:
        """Tell whether to save now; not among bad steps, so that there is something to go back to.

        Example: every=100 and steps 99 to 101 bad: the save is of step 102.
        """
        self._owes_save |= self._due(step, self.config.checkpoint.every)
        self._owes_save |= step in self._stage_ends and self.config.checkpoint.every > 0
        saves = self._owes_save and (self.bad_steps.in_a_row == 0 or step in self._last_steps)
        self._owes_save &= not saves
        return saves

    def _stops(self, step: int, *, saved: bool) -> bool:
        """Tell whether any rank was asked to stop: then all stop after the same step, which is saved.

        Signals reach ranks at different times, so once per step all exchange the largest signal number.
        """
        asked = torch.tensor([preemption.signal_received()], device=self.groups.device)
        with watched("stop"):
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        number = int(asked)
        if not number or step == self.total_steps:
            return False
        # also among bad steps, where `prune` keeps an older one besides
        if self.config.checkpoint.every:
            if saved:
                self._tell_saved(self.saver.wait(must_succeed=True))
            else:
                self.save(step, wait=True)
            saved = True
        self.stopped = preemption.StopRecord(
            step=step, signal=signal.Signals(number).name, saved=saved, generation=own_token()
        )
        return True

    def _stands_at(self) -> tuple[str, bool]:
        """Tell the watchdog what this rank is at, and whether it only waits for other ranks there."""
        point = self.saver.stands_at()
        return (point, point.startswith(WAITS_FOR_OTHERS)) if point else own_standing()

    def _enter(self, stage: Stage, step: int) -> None:
        """Begin a stage, or go on in it after `step` updates."""
        self.engine.set_stage(stage)
        # losses of another stage are no measure of spikes; a run that resumes within a stage keeps its own
        if step == stage.first_step:
            self.bad_steps.new_stage()
        if len(self.stages) > 1:
            self._note(stage_note(stage, self.stages, step, self.total_steps))

    def _is_ours(self, stage: Stage) -> bool:
        """Tell whether these processes are laid out for a stage."""
        config = layout_config(self.config, stage.name)
        return (config.parallel, config.train) == (self.config.parallel, self.config.train)

    def _due(self, step: int, every: int) -> bool:
        """Tell whether something is due after a step: at multiples of `every` (0: never), and the last."""
        return every > 0 and (step % every == 0 or step == self.total_steps)

    def _step(self, step: int, stage: Stage, stream: StageStream) -> dict[str, Any]:
        """Make one step, and validate where it is due; return its metrics, all of them where shown."""
        config, engine, groups = self.config, self.engine, self.groups
        start, self._step_number = time.perf_counter(), step
        rates = stage_rates(step - 1, config.optim, stage, self.total_steps)
        packs = stream.packs(step - 1, groups)
        probed = config.logging.attention_every > 0 and step % config.logging.attention_every == 0
        shown = step % config.logging.every == 0 or self._due(step, config.train.validate_every)
        batch = make_batch(
            packs,
            groups,
            recall_seed=config.train.seed + step if probed else None,
            with_kl_value=shown or probed,
        )
        result = self._train(step, stage, batch, rates)
        counts = self.guard.record(result)
        values: dict[str, Any] = {"lr": rates.backbone, "index_lr": rates.index, "stage": stage.index}
        # The norm is the same on all ranks, so all of them gather, which is a collective, or none does.
        if shown or probed or not (result.is_taken and math.isfinite(result.grad_norm)):
            values |= self.metrics.gather(batch, result, stage, counts_loss=engine.counts_loss())
            values |= router_bias_range(engine.chunks) | counts
        seconds = time.perf_counter() - start
        values["step_time_s"] = seconds
        values["tokens_per_s"] = batch.num_tokens / seconds
        values["tokens"] = stage.tokens_at(step)
        held_out = self.data.validation[stage.seq_len]
        if held_out is not None and self._due(step, config.train.validate_every):
            values |= validate(engine, held_out, self.data.corpus)
        return values

    def _train(self, step: int, stage: Stage, batch: StepBatch, rates: LearningRates) -> StepResult:
        """Make the step, its selections recorded where they are due."""
        every, sparse = self.config.logging.selections_every, stage.attention is StageAttention.sparse
        if not (sparse and every > 0 and step % every == 0):
            return self._take(batch, rates)
        log = SelectionLog(self.config, self.groups, step, stage.topk)
        self.engine.forward.open_selections = log.open
        result = self._take(batch, rates)
        self.engine.forward.open_selections = None
        try:
            log.save()
        except OSError as error:
            self._note(f"step {step}: the selections could not be recorded: {error}; training goes on")
        return result

    def _take(self, batch: StepBatch, rates: LearningRates) -> StepResult:
        """Make the step, unless the guard finds fault with it."""
        # Megatron's collectives have no other name
        with watched("step"):
            return self.engine.train_step(batch, rates, self.guard.gate(batch))

    def _report(self, step: int, values: dict[str, Any]) -> None:
        """Write and print a step whose metrics were gathered, on rank 0."""
        if self.reporting is None or "lm_loss" not in values:
            return
        values |= self._save_metrics
        self._save_metrics = {}
        notes = self.reporting.writer.write(step, values)
        self.reporting.progress.update(step, values)
        for note in notes:
            self._note(note)

    def save(self, step: int, *, wait: bool = False) -> None:
        """Save a checkpoint after `step` steps. All ranks call it.

        Raises:
            CheckpointError: if it failed, with `wait` (until it is visible) or where on_failure=end.
            RollbackError, DivergedError: if weights or moments are not finite, by train.bad_step.
        """
        try:
            reports = self.saver.save(
                step,
                lambda: self.engine.sharded_state(loading=False),
                common={"step": step},
                meta=checkpoint_meta(
                    self.config,
                    self.groups,
                    step,
                    data=self.data.record,
                    bad_steps=self.bad_steps,
                    engine=self.engine.name,
                ),
                wait=wait,
            )
        except SpoiltStateError as error:
            self.guard.spoilt(step, error)
        self.watchdog.beat(f"step {step} and the copy for its checkpoint")
        self._tell_saved(reports)

    def _tell_saved(self, reports: list[SaveReport]) -> None:
        """Print saves that have ended; their times go into the next row of metrics."""
        for report in reports if self.reporting is not None else []:
            self._save_metrics = report.metrics()
            for line in report.lines():
                self._note(line)


def _tell_stalled(error: BaseException) -> None:
    """Leave word of a standstill, for the launcher and for the other ranks, before this process ends."""
    record(error)
    tell_others(error)
