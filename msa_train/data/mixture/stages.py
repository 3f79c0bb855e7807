"""Hold the packs of every stage of a run with a mixture: each goes on where the stages before it stopped.

    stage 1   32K   a: packs 0 to 699 of epoch 0      b: packs 0 to 299
    stage 2   32K   a: packs 700 ...                  b: packs 300 ...        other weights, same packs
    stage 3   128K  a: what the epoch has left, in packs of 128K, then epoch 1 ...

Where a stage begins follows from the plan of the stages, and from what rollbacks have passed over. In a stage
with alternate steps each part is split between packs of the two lengths, see `carried.fragments`; a part of
too few documents stays with the usual ones. Cost of a change of length: see `carried.packs`, for each part.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from msa_train.config import RunConfig, Stage, plan_stages
from msa_train.config.mixture.rules import stage_weights
from msa_train.config.mixture.settings import read_sources, read_weights
from msa_train.config.staging.stage import Alternate
from msa_train.data.carried.packs import Rest
from msa_train.data.carried.streams import Stream, build_stream, passed_over
from msa_train.data.dataset import PackedDataset
from msa_train.data.mixture.packs import (
    VALIDATION_SALT,
    MixedPacks,
    MixedPart,
    PartName,
    PartSize,
    pack_shares,
)
from msa_train.data.mixture.sources import OpenSource
from msa_train.data.prepare import Corpus


@dataclass(slots=True)
class MixedStream:
    """Hold the packs of one stage: usual ones, and those of alternate steps where there are any."""

    usual: MixedPacks
    "by the numbers of `Stage.pack_at`"
    short: MixedPacks | None
    "likewise"


@dataclass(slots=True)
class _Place:
    """Hold where a part stands."""

    stream: Stream
    "of the packs that the part was last read in"
    sizes: tuple[int, Alternate]
    "lengths of these packs"
    usual: int = 0
    "of them that are used"
    short: int = 0
    "of the shorter ones"


class MixedStages:
    """Open the packs of each stage, made when they are asked for.

    Args:
        config: the run.
        corpus: what `prepare_mixture` returned.
    """

    def __init__(self, config: RunConfig, corpus: Corpus) -> None:
        self._config, self._corpus = config, corpus
        self._stages, self._weights = plan_stages(config), stage_weights(config)
        self._sources: dict[int, dict[str, OpenSource]] = {}
        self._made: tuple[tuple[str, list[tuple[int, int]]], MixedStream] | None = None

    def open(self, stage: Stage, rollbacks: Sequence[Mapping[str, Any]] = ()) -> MixedStream:
        """Return the packs of a stage, behind those that earlier ones have used or passed over.

        Args:
            stage: of the run.
            rollbacks: of the run so far, as `SkipPolicy` records them.
        """
        before = self._stages[: stage.index]
        shifts = [passed_over([one], one.stream, rollbacks) for one in before]
        if self._made is None or self._made[0] != (stage.name, shifts):
            # of one stage at a time: earlier ones are not asked for again but after a rollback
            self._made = None
            self._made = (stage.name, shifts), self._make(stage, shifts)
        return self._made[1]

    def make_all(self) -> None:
        """Make the packs of all stages, so that whatever is wrong with one is found."""
        self.validations()
        for stage in self._stages:
            self.open(stage)

    def _parts(self, seq_len: int) -> Sequence[OpenSource]:
        if seq_len not in self._sources:
            names = sorted(self._corpus.sources)
            self._sources[seq_len] = {
                name: OpenSource(self._config, name, self._corpus.source(name), seq_len) for name in names
            }
        return list(self._sources[seq_len].values())

    def _make(self, wanted: Stage, shifts: Sequence[tuple[int, int]]) -> MixedStream:
        """Go through the stages up to this one."""
        places: dict[PartName, _Place] = {}
        for stage, (usual_shift, short_shift) in zip(self._stages, [*shifts, (0, 0)], strict=False):
            sources = self._parts(stage.seq_len)
            wholes = {name: packs for source in sources for name, packs in source.train.items()}
            shares = pack_shares(self._weights[stage.name], part_sizes(wholes))
            for part in shares:
                places[part] = self._moved(places.get(part), wholes[part], stage)
            mixed = self._dealt(stage, {part: places[part] for part in shares}, shares)
            if stage.name == wanted.name:
                return mixed
            usual, short = stage.packs_before(stage.last_step)
            for part, count in mixed.usual.counts(usual + usual_shift).items():
                places[part].usual += count
            for part, count in (mixed.short.counts(short + short_shift) if mixed.short else {}).items():
                places[part].short += count
        raise KeyError(wanted.name)

    def _moved(self, place: _Place | None, whole: PackedDataset, stage: Stage) -> _Place:
        """Bring a part's place to packs of the stage's lengths."""
        sizes = (stage.seq_len, stage.alternate)
        if place is not None and place.sizes == sizes:
            return place
        rest = Rest() if place is None else place.stream.rest(place.usual, place.short)
        return _Place(build_stream(self._config, stage, whole, rest, needs_both=False), sizes)

    def _dealt(
        self, stage: Stage, places: Mapping[PartName, _Place], shares: Mapping[PartName, Fraction]
    ) -> MixedStream:
        """Deal a stage's packs from its parts; shorter ones from those that have documents for them."""
        seed = self._config.data.seed
        usual = [
            MixedPart(name, place.stream.usual, place.usual, shares[name]) for name, place in places.items()
        ]
        mixed = MixedPacks(usual, seed=seed, salt=2 * stage.index, first_pack=stage.first_pack)
        if not stage.alternate.every:
            return MixedStream(mixed, None)
        short = [
            MixedPart(name, place.stream.short, place.short, shares[name])
            for name, place in places.items()
            if place.stream.short is not None
        ]
        if not short:
            raise ValueError(
                f"stages.{stage.name}.alternate.every={stage.alternate.every}: no source and bucket of this "
                "stage has enough documents for packs of two lengths; use more documents, or "
                f"stages.{stage.name}.alternate.every=0"
            )
        return MixedStream(mixed, MixedPacks(short, seed=seed, salt=2 * stage.index + 1))

    def validations(self) -> dict[int, MixedPacks | None]:
        """Return held-out packs in the shares of data.mixture, by their length; None where there are none."""
        return {length: self._validation(length) for length in {stage.seq_len for stage in self._stages}}

    def _validation(self, seq_len: int) -> MixedPacks | None:
        packs = {name: part for source in self._parts(seq_len) for name, part in source.validation.items()}
        weights = read_weights(read_sources(self._config.data.mixture), {}, "data.mixture")
        shares = pack_shares(weights, part_sizes(packs))
        if not shares:
            return None
        parts = [MixedPart(name, packs[name], 0, share) for name, share in shares.items()]
        return MixedPacks(parts, seed=self._config.data.seed, salt=VALIDATION_SALT)


def part_sizes(packs: Mapping[PartName, PackedDataset]) -> dict[PartName, PartSize]:
    """Count what the parts have."""
    return {
        name: PartSize(part.num_documents, part.num_tokens, part.num_packs) for name, part in packs.items()
    }
