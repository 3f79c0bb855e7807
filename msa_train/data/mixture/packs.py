"""Give the packs of a stage, dealt from buckets of sources.

A part of a mixture is one bucket of one source. Each part has packs of its own, so that a pack holds
documents of one source and of like length: a stage that wants long documents gets packs full of them. A part
goes through its documents epoch by epoch, none twice within one; when it ends, its next epoch begins, in
another order, whatever the other parts have left. Weights are shares of tokens: a part whose packs have more
padding is dealt more of them.

Which pack a step has follows from the seed, the stages and the step's number. Cost: see `deal`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from msa_train.config.mixture.settings import SourceWeight
from msa_train.data.mixture.deal import PackDeal
from msa_train.data.packing import Pack, Packs

VALIDATION_SALT = 1 << 30
"no stage has this number"


@dataclass(frozen=True, slots=True, order=True)
class PartName:
    """Name a part of a mixture."""

    source: str
    "of data.mixture"
    bucket: str
    "one of BUCKETS"


@dataclass(slots=True)
class PartSize:
    """Count what one epoch of a part has."""

    num_documents: int
    "documents"
    num_tokens: int
    "without padding"
    num_packs: int
    "packs of the stage's length"


def pack_shares(
    weights: Mapping[str, SourceWeight], sizes: Mapping[PartName, PartSize]
) -> dict[PartName, Fraction]:
    """Return what share of the packs each part has, so that the tokens are shared as the weights say.

    Args:
        weights: by source; those that are not named have nothing.
        sizes: of the parts that there are.

    Returns:
        Parts with a share, in their order; the shares add up to 1.

    Example: sources a and b of weight 1, a with packs half full, b with full ones: a has 2 of 3 packs.
    """
    shares: dict[PartName, Fraction] = {}
    for name in sorted(sizes):
        if name.source not in weights or not sizes[name].num_packs:
            continue
        share = _token_share(weights[name.source], name, sizes)
        if share:
            shares[name] = share * sizes[name].num_packs / sizes[name].num_tokens
    total = sum(shares.values(), Fraction(0))
    return {name: share / total for name, share in shares.items()}


def _token_share(weight: SourceWeight, name: PartName, sizes: Mapping[PartName, PartSize]) -> Fraction:
    """Return the part's share of all tokens, relative to other parts'."""
    if weight.buckets:
        of_source = {bucket: Fraction(value) for bucket, value in weight.buckets.items()}
    else:
        of_source = {part.bucket: Fraction(size.num_tokens) for part, size in sizes.items()
                     if part.source == name.source}  # fmt: skip
    total = sum(of_source.values(), Fraction(0))
    return Fraction(weight.weight) * of_source.get(name.bucket, Fraction(0)) / total


@dataclass(slots=True)
class MixedPart:
    """Hold what one part gives to a stage."""

    name: PartName
    "of the part"
    packs: Packs
    "of the stage's length"
    used: int
    "of them that earlier stages have used"
    share: Fraction
    "of the stage's packs, relative to other parts"


class MixedPacks:
    """Give the packs of one stage by their number, as a data set does.

    Args:
        parts: what packs are dealt from, at least one.
        seed: data.seed.
        salt: tells stages apart.
        first_pack: number that the stage's first pack is asked for by.
    """

    def __init__(self, parts: Sequence[MixedPart], *, seed: int, salt: int, first_pack: int = 0) -> None:
        self._parts, self._first_pack = parts, first_pack
        self._deal = PackDeal([part.share for part in parts], seed=seed, salt=salt)

    @property
    def num_packs(self) -> int:
        """Return the packs of one epoch of every part, in all."""
        return sum(part.packs.num_packs for part in self._parts)

    def __getitem__(self, index: int) -> Pack:
        """Build pack number `index` of the run.

        Raises:
            IndexError: for one before the stage.
            ValueError: if a token id has no row in the embedding.
        """
        if index < self._first_pack:
            raise IndexError(f"pack {index}: the stage begins with pack {self._first_pack}")
        place, number = self._deal.locate(index - self._first_pack)
        part = self._parts[place]
        return part.packs[part.used + number]

    def counts(self, num_packs: int) -> dict[PartName, int]:
        """Return how many of the stage's first `num_packs` packs are each part's."""
        counts = self._deal.counts(num_packs)
        return {part.name: count for part, count in zip(self._parts, counts, strict=True)}
