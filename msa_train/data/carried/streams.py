"""Build the packs of a stretch of stages: usual ones, and shorter ones of alternate steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msa_train.config import RunConfig, Stage
from msa_train.data.carried.fragments import Fragments, split_short, whole_documents
from msa_train.data.carried.packs import CarriedPacks, Rest, packs_of, unite
from msa_train.data.dataset import PackedDataset


@dataclass(slots=True)
class Stream:
    """Hold the packs of one stream: usual ones, and those of alternate steps where there are any."""

    usual: CarriedPacks
    short: CarriedPacks | None
    documents: tuple[Fragments, Fragments] | None
    "all documents of both kinds of packs, where there are two"

    def rest(self, usual: int, short: int) -> Rest:
        """Return what is left of the documents after so many packs of each kind."""
        if self.short is None or self.documents is None:
            return self.usual.rest(usual)
        return unite([self.usual.rest(usual), self.short.rest(short)], self.documents)


def build_stream(
    config: RunConfig, stage: Stage, whole: PackedDataset, rest: Rest, *, needs_both: bool = True
) -> Stream:
    """Build the packs of a stream.

    Args:
        config: the run.
        stage: the stream's first.
        whole: packs of the stage's length of all documents.
        rest: what is left of them.
        needs_both: too few documents for packs of two lengths are an error; else there are no shorter ones.

    Raises:
        ValueError: if there are too few documents for packs of two lengths.
    """
    sizes: dict[str, int] = {
        "block_size": config.attention.block_size,
        "seed": config.data.seed,
    }
    short = stage.alternate
    if not short.every:
        return Stream(CarriedPacks(whole, rest, seq_len=stage.seq_len, **sizes), None, None)
    tokens = short.global_batch_size * short.seq_len
    usual_tokens = (short.every - 1) * stage.global_batch_size * stage.seq_len
    share = tokens / (tokens + usual_tokens)
    seed = sizes["seed"]

    def split(part: Fragments) -> tuple[Fragments, Fragments]:
        return split_short(part, share=share, seq_len=short.seq_len, seed=seed)

    documents = split(whole_documents(whole.view.begin, whole.view.lengths))
    is_split = all(len(side) for side in documents)
    if not is_split and not needs_both:
        return Stream(CarriedPacks(whole, rest, seq_len=stage.seq_len, **sizes), None, None)
    if not is_split:
        raise ValueError(
            f"stages.{stage.name}.alternate.every={short.every}: the corpus has too few documents for "
            f"packs of two lengths; use more documents, or stages.{stage.name}.alternate.every=0"
        )
    rounds = [split(part) for part in rest.rounds]
    lengths = (stage.seq_len, short.seq_len)
    usual_packs, short_packs = (
        CarriedPacks(
            packs_of(whole, documents[side], seq_len=lengths[side], **sizes),
            Rest(tuple(both[side] for both in rounds if len(both[side])), rest.epoch),
            seq_len=lengths[side],
            **sizes,
        )
        for side in (0, 1)
    )
    return Stream(usual_packs, short_packs, documents)


def passed_over(
    stages: Sequence[Stage], stream: int, rollbacks: Sequence[Mapping[str, Any]]
) -> tuple[int, int]:
    """Count the packs of a stream that rollbacks have passed over: usual ones, and shorter ones.

    A rollback from step 7 to the checkpoint of step 4 passes over the packs of steps 5 to 7; what it passes
    over of a later stream comes again, in other packs.
    """
    usual = short = 0
    own = [stage for stage in stages if stage.stream == stream]
    first, last = own[0].first_step, own[-1].last_step
    for event in rollbacks:
        begin, end = event.get("to_step"), event.get("from_step")
        if not (isinstance(begin, int) and isinstance(end, int) and first <= begin < last):
            continue
        for stage in own:
            low, high = max(begin, stage.first_step), min(end, stage.last_step)
            if low < high:
                before, after = stage.packs_before(low), stage.packs_before(high)
                usual, short = usual + after[0] - before[0], short + after[1] - before[1]
    return usual, short
