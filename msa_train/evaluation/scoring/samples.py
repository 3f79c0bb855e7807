"""Score samples in the teacher-forced way: the model reads prompt, prefix and the right answer at once.

A hit is a sample whose every answer token is the likeliest word where the answer so far is right. That is
what greedy decoding would write, so for answers of one reference it is a strict lower bound of a score that
looks for the reference in a generated text. Answers without an order (several values, lists of words) have
token accuracy and NLL only. Needs no cache and no decoding; results bear the mode `tf`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from msa_train.evaluation.scoring.engine import EvaluatedEngine
from msa_train.evaluation.scoring.needle_rate import NeedleRate
from msa_train.evaluation.scoring.packs import document_of
from msa_train.evaluation.scoring.tokens import run_documents, sum_over_ranks
from msa_train.evaluation.tasks.sample import Sample

MODE = "tf"


@dataclass(frozen=True, slots=True)
class SampleScore:
    """Hold how a sample went."""

    num_tokens: int
    "of the answer"
    num_correct: int
    "of them, whose prediction was the right word"
    nll: float
    "nats of the whole answer"

    @property
    def is_hit(self) -> bool:
        """Tell whether every token was right."""
        return self.num_correct == self.num_tokens


def score_samples(
    engine: EvaluatedEngine, samples: Sequence[Sample], *, needle_rate: NeedleRate | None = None
) -> list[SampleScore]:
    """Score samples, the same list on all ranks. All ranks call it, and get all scores.

    Over ranks one all-reduce of 24 bytes per sample.

    Args:
        engine: of the run.
        samples: of any task and length.
        needle_rate: counts selections of their needles.
    """
    sums = np.zeros((len(samples), 3))
    documents = [document_of(sample) for sample in samples]
    for seen in run_documents(engine, documents, predicts=True, needle_rate=needle_rate):
        for column, values in enumerate((np.ones(len(seen.document)), seen.correct, seen.losses)):
            np.add.at(sums[:, column], seen.document, values)
    scores = [SampleScore(round(n), round(k), float(nll)) for n, k, nll in sum_over_ranks(sums, engine)]
    for sample, score in zip(samples, scores, strict=True):
        expected = sum(stop - start for start, stop in sample.answers)
        assert score.num_tokens == expected, "every answer token is seen by one rank"
    return scores
