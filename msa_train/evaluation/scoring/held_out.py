"""Tell the loss of held-out documents by position, and what context before the last tokens is worth.

Both are less noisy than scores of tasks: an extension must show that the loss goes on falling with the
position, and that the same last tokens are easier to predict with more before them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from msa_train.data import Packs
from msa_train.evaluation.intervals import mean_interval
from msa_train.evaluation.scoring.engine import EvaluatedEngine
from msa_train.evaluation.scoring.packs import Document
from msa_train.evaluation.scoring.tokens import run_documents, sum_over_ranks

# log2 of a position below 2^40
_NUM_BINS = 40


def held_out_documents(dataset: Packs, num_packs: int) -> list[npt.NDArray[np.int64]]:
    """Take the documents, or the pieces of long ones, of the first packs: [n] tokens each."""
    documents: list[npt.NDArray[np.int64]] = []
    for number in range(min(num_packs, dataset.num_packs)):
        pack = dataset[number]
        for start, length in zip(pack.cu_seqlens[:-1].tolist(), pack.doc_lengths.tolist(), strict=True):
            documents.append(pack.tokens[start : start + length])
    return [tokens for tokens in documents if len(tokens) > 1]


def loss_by_position(
    engine: EvaluatedEngine, documents: Sequence[npt.NDArray[np.int64]]
) -> dict[int, tuple[int, float]]:
    """Compute the mean loss of tokens by log2 of their position. All ranks call it.

    Example: bin 3 holds tokens 8 to 15 of every document, counted from 0.

    Returns:
        {bin: (tokens, nats)}, bins without tokens left out.
    """
    sums = np.zeros((_NUM_BINS, 2))
    labelled = [Document(tokens, ((1, len(tokens)),)) for tokens in documents]
    for seen in run_documents(engine, labelled, predicts=False):
        # exact where log2 of a float is not: 2^k has exponent k + 1
        bins = np.frexp(seen.place.astype(np.float64))[1] - 1
        np.add.at(sums[:, 0], bins, 1)
        np.add.at(sums[:, 1], bins, seen.losses)
    return {
        number: (round(count), float(nll / count))
        for number, (count, nll) in enumerate(sum_over_ranks(sums, engine))
        if count
    }


@dataclass(slots=True)
class ContextLoss:
    """Hold the loss of last tokens with some context before them."""

    context: int
    "tokens before them"
    documents: int
    "that are long enough"
    loss: float
    "nats per token, mean over these documents"
    gain: float = 0.0
    "how much less that is than with the shortest context, for the same documents"
    half_interval: float = 0.0
    "half of the 95% interval of the gain"
    gains: list[float] = field(default_factory=list[float])
    "of each document"


def gain_from_context(
    engine: EvaluatedEngine,
    documents: Sequence[npt.NDArray[np.int64]],
    contexts: Sequence[int],
    last_tokens: int,
) -> list[ContextLoss]:
    """Compute the loss of the same last tokens with more and less before them. All ranks call it.

    Positions begin anew with the context, as they would in a shorter document. Each context is a forward
    pass of its own: 1/8, 1/4, 1/2 and all of it cost 1.9 times the longest.

    Args:
        engine: of the run.
        documents: of which those with room for the shortest context take part.
        contexts: tokens before the last ones, ascending.
        last_tokens: tokens that are compared.

    Returns:
        By context; those that no document is long enough for are left out.
    """
    fitting = {
        context: [i for i, tokens in enumerate(documents) if len(tokens) >= context + last_tokens]
        for context in contexts
    }
    pairs = [(context, i) for context in contexts for i in fitting[context]]
    if not pairs:
        return []
    cut = [
        Document(documents[i][-(context + last_tokens) :], ((context, context + last_tokens),))
        for context, i in pairs
    ]
    sums = np.zeros(len(pairs))
    for seen in run_documents(engine, cut, predicts=False):
        np.add.at(sums, seen.document, seen.losses)
    losses = sum_over_ranks(sums, engine) / last_tokens
    by_pair = {pair: float(loss) for pair, loss in zip(pairs, losses, strict=True)}
    return [_one(context, fitting[context], by_pair, contexts[0]) for context in contexts if fitting[context]]


def _one(
    context: int, documents: list[int], losses: dict[tuple[int, int], float], shortest: int
) -> ContextLoss:
    own = [losses[context, i] for i in documents]
    gains = [losses[shortest, i] - losses[context, i] for i in documents]
    gain, half = mean_interval(gains)
    return ContextLoss(context, len(documents), mean_interval(own)[0], gain, half, gains)
