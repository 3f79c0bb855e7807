"""Deal the packs of a stage to its sources: exact shares, evenly spread, found from a pack's number alone.

Packs are dealt in turns of TURN. By the end of turn t a source with share p has had floor(p x TURN x t) packs
or one more, exactly, whatever the shares: floors of running sums in whole numbers, which no rounding adds to.
Within a turn each source's packs are spread evenly, each by chance within its own stretch of the turn: any
n packs in a row hold p x n of it, within about two.

Cost: a turn of 4,096 packs is sorted in 1 ms and takes 40 KB; two are kept. Nothing grows with ranks, steps,
documents or the model.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

TURN = 4096
"packs that are dealt at a time"
_MIX_STREAM = 3
"of random numbers; 0 to 2 are in packing"
_TURNS_KEPT = 2


@dataclass(slots=True)
class _Turn:
    part: npt.NDArray[np.integer]
    "[TURN] whose pack it is"
    number: npt.NDArray[np.integer]
    "[TURN] which one of that part's, counted over all turns"


class PackDeal:
    """Tell whose each pack is, and which one of that part's.

    Args:
        shares: of the packs, one per part; any numbers, 0 included, that are not all 0.
        seed: of the order within turns.
        salt: tells one stage's order from another's.
    """

    def __init__(self, shares: Sequence[Fraction], *, seed: int, salt: int = 0) -> None:
        assert all(share >= 0 for share in shares), shares
        assert any(shares), shares
        total = sum(shares, Fraction(0))
        # running sums 0 to 1: part s has the stretch from edges[s] to edges[s + 1]
        self._edges = [Fraction(0), *(edge / total for edge in accumulate(shares))]
        self._seed, self._salt = seed, salt
        self._turns: dict[int, _Turn] = {}
        self._lock = threading.Lock()

    @property
    def num_parts(self) -> int:
        """Count the parts."""
        return len(self._edges) - 1

    def locate(self, index: int) -> tuple[int, int]:
        """Return the part that pack `index` belongs to, and its number among that part's, both from 0 on.

        Example: shares 1/2 and 1/2: packs 0 and 1 are pack 0 of each part, in an order by chance.
        """
        turn, place = divmod(index, TURN)
        dealt = self._turn(turn)
        return int(dealt.part[place]), int(dealt.number[place])

    def counts(self, num_packs: int) -> list[int]:
        """Return how many of the first `num_packs` packs are each part's: [num_parts]."""
        turn, place = divmod(num_packs, TURN)
        before = self._before(turn)
        within = np.bincount(self._turn(turn).part[:place], minlength=self.num_parts)
        return [count + int(more) for count, more in zip(before, within, strict=True)]

    def _before(self, turn: int) -> list[int]:
        """Return how many packs each part has had before a turn."""
        # whole numbers throughout: floors of one running sum, whose differences add up to the packs dealt
        floors = [turn * TURN * edge.numerator // edge.denominator for edge in self._edges]
        return [end - begin for begin, end in pairwise(floors)]

    def _turn(self, turn: int) -> _Turn:
        """Return a turn; asked for by the step's thread and by the one that reads ahead."""
        with self._lock:
            if turn not in self._turns:
                while len(self._turns) >= _TURNS_KEPT:
                    # the reader goes forward, or back after a rollback: the farthest is needed least
                    del self._turns[max(self._turns, key=lambda kept: abs(kept - turn))]
                self._turns[turn] = self._deal(turn)
            return self._turns[turn]

    def _deal(self, turn: int) -> _Turn:
        before = self._before(turn)
        counts = np.array([end - begin for begin, end in zip(before, self._before(turn + 1), strict=True)])
        part = np.repeat(np.arange(self.num_parts), counts)
        # number of each pack within its part and turn
        rank = np.arange(TURN) - np.repeat(np.cumsum(counts) - counts, counts)
        seeds = np.random.SeedSequence([self._seed, _MIX_STREAM, self._salt, turn])
        # the raw stream of a bit generator is kept by numpy for ever; 53 bits make a number from 0 to 1
        chance = (np.random.PCG64(seeds).random_raw(TURN) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        order = np.argsort((rank + chance) / np.repeat(counts, counts), kind="stable")
        number = rank + np.repeat(np.array(before), counts)
        return _Turn(part[order].astype(np.uint16), number[order])
