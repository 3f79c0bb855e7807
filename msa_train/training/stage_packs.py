"""Find the packs of every step of a run, whose stages have packs of other lengths and batches.

Stages that go on in the same packs are one stream. A new stream packs what the one before has left of the
documents, so each is seen once per epoch, however often the length changes (`data/carried`). All of it
follows from the plan and from what rollbacks have passed over: no rank asks another, a resumed run finds the
same packs, and a layout changes nothing.

Cost of a new stream: see `carried.packs`. Going on within one costs nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from msa_train.config import RunConfig, Stage, plan_stages
from msa_train.data import BatchStream, Pack, PackedDataset
from msa_train.data.carried.fragments import Fragments, split_short, whole_documents
from msa_train.data.carried.packs import CarriedPacks, Rest, packs_of, unite
from msa_train.parallel.process_groups import Groups

NO_SHIFT = (0, 0)


@dataclass(slots=True)
class _Stream:
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


class StagePacks:
    """Open the packs of stages, one after another."""

    def __init__(self, config: RunConfig, whole: Mapping[int, PackedDataset]) -> None:
        """Take the packs of all documents, by their length; nothing is read or packed yet."""
        self.config, self.stages, self._whole = config, plan_stages(config), whole
        self._streams: dict[tuple[int, tuple[tuple[int, int], ...]], _Stream] = {}
        "by index, and by what rollbacks have passed over before"

    def open(self, stage: Stage, rollbacks: Sequence[Mapping[str, Any]]) -> "StageStream":
        """Open the packs of a stage; a context manager that reads ahead.

        Args:
            stage: of the run.
            rollbacks: of the run so far, as `SkipPolicy` records them.
        """
        shift = passed_over(self.stages, stage.stream, rollbacks)
        return StageStream(stage, self._stream(stage.stream, rollbacks), shift)

    def _stream(self, index: int, rollbacks: Sequence[Mapping[str, Any]]) -> _Stream:
        """Return a stream; those before it, from which it follows, are built with it."""
        streams = [number for number in dict.fromkeys(s.stream for s in self.stages) if number <= index]
        shifts = tuple(passed_over(self.stages, number, rollbacks) for number in streams)
        rest, stream = Rest(), None
        for place, number in enumerate(streams):
            key = (number, shifts[:place])
            if key not in self._streams:
                self._streams[key] = self._build(self.stages[number], rest)
            stream = self._streams[key]
            if number != index:
                last = [stage for stage in self.stages if stage.stream == number][-1]
                usual, short = last.packs_before(last.last_step)
                by = shifts[place]
                rest = stream.rest(last.first_pack + usual + by[0], short + by[1])
        assert stream is not None, "a stage has a stream"
        return stream

    def _build(self, stage: Stage, rest: Rest) -> _Stream:
        sizes: dict[str, int] = {
            "block_size": self.config.attention.block_size,
            "seed": self.config.data.seed,
        }
        whole, short = self._whole[stage.seq_len], stage.alternate
        if not short.every:
            return _Stream(CarriedPacks(whole, rest, seq_len=stage.seq_len, **sizes), None, None)
        tokens = short.global_batch_size * short.seq_len
        usual_tokens = (short.every - 1) * stage.global_batch_size * stage.seq_len
        share = tokens / (tokens + usual_tokens)
        seed = sizes["seed"]

        def split(part: Fragments) -> tuple[Fragments, Fragments]:
            return split_short(part, share=share, seq_len=short.seq_len, seed=seed)

        documents = split(whole_documents(whole.view.begin, whole.view.lengths))
        if not all(len(side) for side in documents):
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
        return _Stream(usual_packs, short_packs, documents)


class StageStream:
    """Read the packs of a stage's steps, each step's while the one before computes."""

    def __init__(self, stage: Stage, stream: _Stream, shift: tuple[int, int] = NO_SHIFT) -> None:
        self.stage, self._shift = stage, shift
        self._usual = BatchStream(stream.usual)
        self._short = None if stream.short is None else BatchStream(stream.short)

    def numbers(self, step: int) -> range:
        """Return the numbers of the packs of the update that follows `step` updates, within their stream.

        Example: 8 packs per step: the third step of a run begins at pack 16; after a rollback past 2 packs at
        pack 18.
        """
        first = self.stage.pack_at(step) + self._shift[self.stage.is_alternate(step)]
        return range(first, first + self.stage.batch_at(step))

    def packs(self, step: int, groups: Groups) -> list[Pack]:
        """Return this rank's packs of the update that follows `step` updates."""
        numbers = self.numbers(step)
        stream = self._short if self.stage.is_alternate(step) else self._usual
        assert stream is not None, "a stage with alternate steps has packs for them"
        return stream.packs(numbers.start, groups.dp_rank, groups.dp_size, len(numbers))

    def __enter__(self) -> "StageStream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._usual.close()
        if self._short is not None:
            self._short.close()


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
