"""Run documents through the training forward, and bring what was seen of labelled tokens together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from msa_train.data import IGNORE_LABEL
from msa_train.evaluation.scoring.engine import EvaluatedEngine, dealt, is_surplus, observed
from msa_train.evaluation.scoring.needle_rate import NeedleRate
from msa_train.evaluation.scoring.packs import (
    Document,
    PackedDocuments,
    pack_documents,
    pack_length,
    pack_unit,
)
from msa_train.model.inputs.pack_plan import shard_layout
from msa_train.parallel.comm.fault_watch import watched


@dataclass(slots=True)
class SeenTokens:
    """Hold what this rank saw of labelled tokens of one pack; n of them."""

    document: npt.NDArray[np.int64]
    "[n] number of the document"
    place: npt.NDArray[np.int64]
    "[n] the predicted token's place in its document"
    losses: npt.NDArray[np.float64]
    "[n] nats"
    correct: npt.NDArray[np.bool_]
    "[n] the label is the likeliest word; false where that was not asked for"


def run_documents(
    engine: EvaluatedEngine,
    documents: Sequence[Document],
    *,
    predicts: bool,
    needle_rate: NeedleRate | None = None,
) -> Iterator[SeenTokens]:
    """Run documents, several in a pack, and yield what this rank saw of each of its packs. All ranks call it.

    Surplus packs, and ranks whose figures are those of another one, yield nothing. Costs one forward pass of
    all tokens: a quarter of a training step of as many, with the whole recomputed a fifth.

    Args:
        engine: of the run; its stage decides attention and rotary embedding.
        documents: the same on all ranks.
        predicts: compare the likeliest word with the label.
        needle_rate: is told selections.
    """
    config, groups = engine.config, engine.groups
    num_tokens = pack_length(
        [len(document.tokens) for document in documents],
        unit=pack_unit(config),
        block_size=config.attention.block_size,
        longest=engine.stage.seq_len,
        num_ranks=groups.dp_size,
    )
    packed = pack_documents(documents, num_tokens=num_tokens, block_size=config.attention.block_size)
    own = dealt(len(packed), groups)
    with observed(engine, predicts=predicts) as observer:
        # pipeline stages overlap where they get all packs at once
        with watched("evaluation"):
            if needle_rate is not None:
                needle_rate.watch(engine, [packed[i] for i in own], len(packed))
            engine.evaluate([packed[i].pack for i in own])
        if needle_rate is not None:
            needle_rate.leave(engine)
        if not engine.counts_loss():
            return
        # an interleaved pipeline may run the last pack again
        records = observer.records[: len(own)]
    for turn, (number, record) in enumerate(zip(own, records, strict=True)):
        if not is_surplus(turn, len(packed), groups):
            positions = _positions(engine, packed[number])[record.rows.numpy()]
            predicted = None if record.predicted is None else record.predicted.numpy()
            yield _seen(packed[number], positions, record.losses.double().numpy(), predicted)


def _positions(engine: EvaluatedEngine, packed: PackedDocuments) -> npt.NDArray[np.int64]:
    """Return the positions of this rank's tokens in the pack: [T]."""
    layout = shard_layout(engine.config, packed.pack, engine.groups.cp_rank)
    return np.concatenate([np.arange(start, stop) for start, stop in layout.ranges])


def _seen(
    packed: PackedDocuments,
    positions: npt.NDArray[np.int64],
    losses: npt.NDArray[np.float64],
    predicted: npt.NDArray[np.int64] | None,
) -> SeenTokens:
    """Tell which token of which document each labelled position predicts."""
    numbers, starts = np.array(packed.placed, np.int64).reshape(-1, 2).T
    slot = np.searchsorted(starts, positions, side="right") - 1
    labels = packed.pack.labels[positions]
    assert not (labels == IGNORE_LABEL).any(), "the observer looks at labelled tokens"
    correct = np.zeros(len(positions), bool) if predicted is None else predicted == labels
    return SeenTokens(numbers[slot], positions - starts[slot] + 1, losses, correct)


def sum_over_ranks(values: npt.NDArray[np.float64], engine: EvaluatedEngine) -> npt.NDArray[np.float64]:
    """Add up an array over all ranks: one all-reduce of 8 bytes per number."""
    total = torch.from_numpy(values).to(engine.groups.device, copy=True)
    with watched("evaluation"):
        dist.all_reduce(total)
    return total.cpu().numpy()
