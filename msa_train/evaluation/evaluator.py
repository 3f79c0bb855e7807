"""Evaluate a model: tasks at all lengths, losses by position, gains from context.

    for each length and task    samples made by all ranks together, scored, one row
    held-out documents          loss by position, one row; gain from context, one row

Cost, by arithmetic: samples x length tokens of one forward pass each, a quarter of a training step of as many
tokens. 13 tasks with 25 samples at 1M cost as much as 80 training steps of one 1M pack; a single needle at
5 depths costs one and a quarter. Memory is that of a forward pass without gradients, and the samples of one
task and length: 200 MB on every rank for 25 of 1M tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from msa_train.config.evaluation.settings import (
    context_lengths,
    num_last_tokens,
    sample_lengths,
    task_names,
)
from msa_train.config.stage_plan import longest_seq_len
from msa_train.data import Packs
from msa_train.data.tokenizers.tokenizer import build_tokenizer
from msa_train.evaluation.inputs import load_material, make_sample
from msa_train.evaluation.rows import Row, context_row, identity, position_row, task_row
from msa_train.evaluation.scoring.engine import EvaluatedEngine
from msa_train.evaluation.scoring.held_out import gain_from_context, held_out_documents, loss_by_position
from msa_train.evaluation.scoring.needle_rate import NeedleRate
from msa_train.evaluation.scoring.samples import score_samples
from msa_train.evaluation.shared_samples import own_indices, share_samples
from msa_train.evaluation.tasks.sample import Sample, TokenCounts
from msa_train.evaluation.undisturbed import undisturbed
from msa_train.parallel.comm.fault_watch import watched
from msa_train.runtime import preemption


@dataclass(slots=True)
class Plan:
    """Hold what an evaluation measures."""

    cells: list[tuple[int, str]]
    "(length, task)"
    left_out: list[int]
    "lengths that are longer than the stage's packs"


class Evaluator:
    """Evaluate the model of an engine, as often as asked, always with the same samples."""

    def __init__(self, engine: EvaluatedEngine, held_out: Callable[[int], Packs | None], facts: Row) -> None:
        """Load what samples are written with.

        Args:
            engine: of the run.
            held_out: gives the held-out packs of a length.
            facts: what every row says of the run: checkpoint, code, tokenizer and the like.

        Raises:
            ValueError: if a file of the user's cannot be used.
        """
        self.engine, self.held_out, self.facts = engine, held_out, facts
        self.config = engine.config
        self.settings = engine.config.evaluation
        # what is not installed was said before anything started
        self.material, _ = load_material(self.settings)
        self.counts = TokenCounts(build_tokenizer(self.config.data))

    def plan(self, *, within_stage: bool) -> Plan:
        """List what is measured; within_stage: at most at the length of the stage's packs."""
        lengths = sample_lengths(self.settings, longest_seq_len(self.config))
        limit = self.engine.stage.seq_len if within_stage else max(lengths)
        fitting = [length for length in lengths if length <= limit]
        tasks = task_names(self.settings)
        return Plan(
            [(length, task) for length in fitting for task in tasks],
            [length for length in lengths if length > limit],
        )

    def run(self, step: int, *, source: str, within_stage: bool) -> list[Row]:
        """Evaluate. All ranks call it and get the same rows; the training is left as it was, to the bit.

        Where a signal asks the run to stop it ends before the next task, with what is measured by then.

        Args:
            step: updates made, for the rows.
            source: "training" or "msa-eval".
            within_stage: leave out lengths beyond the stage's packs, for whose memory nothing is planned.
        """
        about = identity(self.config, self.engine.stage) | self.facts | self.material.names()
        about |= {"step": step, "source": source, "tokenizer": self.counts.tokenizer.fingerprint}
        with undisturbed(self.engine):
            rows = list(self._rows(self.plan(within_stage=within_stage)))
        return [row | about for row in rows]

    def _rows(self, plan: Plan) -> Iterator[Row]:
        for length, task in plan.cells:
            if self._is_asked_to_stop():
                return
            yield from self._task(length, task)
        if self.settings.held_out_packs and not self._is_asked_to_stop():
            yield from self._held_out()

    def _task(self, length: int, task: str) -> Iterator[Row]:
        """Measure a task at a length; no row where no sample fits."""
        settings, groups = self.settings, self.engine.groups
        own = [self._sample(task, length, index) for index in own_indices(settings.samples, groups)]
        samples = share_samples(own, settings.samples, groups)
        if not samples:
            return
        rate = None
        if settings.selections and NeedleRate.is_measured(self.engine) and samples[0].needles:
            rate = NeedleRate(self.config, groups, samples)
        scores = score_samples(self.engine, samples, needle_rate=rate)
        rates = None if rate is None else rate.rates()
        yield task_row(samples, scores, rates, settings.depths) | {"asked_for": settings.samples}

    def _sample(self, task: str, length: int, index: int) -> Sample | None:
        """Make a sample; None where it does not fit, as a question whose documents are too long."""
        try:
            return make_sample(self.settings, self.material, self.counts, task, length, index)
        except ValueError:
            # the first sample was made before anything started; a later one ends no training
            return None

    def _held_out(self) -> Iterator[Row]:
        """Measure held-out documents of the stage's length; nothing where none are held out."""
        seq_len = self.engine.stage.seq_len
        dataset = self.held_out(seq_len)
        if dataset is None:
            return
        documents = held_out_documents(dataset, self.settings.held_out_packs)
        if not documents:
            return
        yield position_row(loss_by_position(self.engine, documents), seq_len, len(documents))
        last = num_last_tokens(self.settings, seq_len)
        contexts = context_lengths(self.settings, seq_len)
        losses = gain_from_context(self.engine, documents, contexts, last) if contexts else []
        if losses:
            yield context_row(losses, seq_len, last)

    def _is_asked_to_stop(self) -> bool:
        """Tell whether any rank got a signal: one all-reduce of 8 bytes."""
        asked = torch.tensor([preemption.signal_received()], device=self.engine.groups.device)
        with watched("evaluation"):
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return bool(int(asked))
