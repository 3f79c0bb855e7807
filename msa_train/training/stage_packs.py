"""Find the packs of every step of a run, whose stages have packs of other lengths and batches.

Stages that go on in the same packs are one stream. A new stream packs what the one before has left of the
documents, so each is seen once per epoch, however often the length changes (`data/carried`). All of it
follows from the plan and from what rollbacks have passed over: no rank asks another, a resumed run finds the
same packs, and a layout changes nothing.

Cost of a new stream: see `carried.packs`. Going on within one costs nothing.
"""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from msa_train.config import RunConfig, Stage, plan_stages
from msa_train.data import BatchStream, Pack, PackedDataset
from msa_train.data.carried.packs import Rest
from msa_train.data.carried.streams import Stream, build_stream, passed_over
from msa_train.data.mixture.stages import MixedStages, MixedStream
from msa_train.parallel.process_groups import Groups

NO_SHIFT = (0, 0)


class StagePacks:
    """Open the packs of stages, one after another."""

    def __init__(
        self, config: RunConfig, whole: Mapping[int, PackedDataset], mixed: MixedStages | None = None
    ) -> None:
        """Take the packs of all documents, by their length, or a mixture; nothing is read or packed yet."""
        self.config, self.stages, self._whole = config, plan_stages(config), whole
        self._mixed = mixed
        self._streams: dict[tuple[int, tuple[tuple[int, int], ...]], Stream] = {}
        "by index, and by what rollbacks have passed over before"

    def open(self, stage: Stage, rollbacks: Sequence[Mapping[str, Any]]) -> "StageStream":
        """Open the packs of a stage; a context manager that reads ahead.

        Args:
            stage: of the run.
            rollbacks: of the run so far, as `SkipPolicy` records them.
        """
        if self._mixed is not None:
            mixed = self._mixed.open(stage, rollbacks)
            return StageStream(stage, mixed, passed_over([stage], stage.stream, rollbacks))
        shift = passed_over(self.stages, stage.stream, rollbacks)
        return StageStream(stage, self._stream(stage.stream, rollbacks), shift)

    def _stream(self, index: int, rollbacks: Sequence[Mapping[str, Any]]) -> Stream:
        """Return a stream; those before it, from which it follows, are built with it."""
        streams = [number for number in dict.fromkeys(s.stream for s in self.stages) if number <= index]
        shifts = tuple(passed_over(self.stages, number, rollbacks) for number in streams)
        rest, stream = Rest(), None
        for place, number in enumerate(streams):
            key = (number, shifts[:place])
            if key not in self._streams:
                stage = self.stages[number]
                self._streams[key] = build_stream(self.config, stage, self._whole[stage.seq_len], rest)
            stream = self._streams[key]
            if number != index:
                last = [stage for stage in self.stages if stage.stream == number][-1]
                usual, short = last.packs_before(last.last_step)
                by = shifts[place]
                rest = stream.rest(last.first_pack + usual + by[0], short + by[1])
        assert stream is not None, "a stage has a stream"
        return stream


class StageStream:
    """Read the packs of a stage's steps, each step's while the one before computes."""

    def __init__(self, stage: Stage, stream: Stream | MixedStream, shift: tuple[int, int] = NO_SHIFT) -> None:
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
