"""Make up selections with stated properties, a function of their parameters and the seed alone.

Two ways to state how much a rank's queries agree:

- `f`: every rank selects the same share of the remote blocks it may see, so that the mean over ranks of
  selected / remote blocks is f (the `kv_selected_fraction` of the training log). Which ones: drawn without
  replacement by the weights below.
- `alike_tokens`: neighbouring queries that choose alike; every run of so many draws its own blocks, and f
  is what comes out.

Every query takes its `local_blocks` last blocks and the document's first `sink_blocks`. A further block is,
with probability `popular_share`, one of the KV head's popular ones (Zipf with exponent `popular_exponent`
over a random order of all blocks, the same for all queries), else at a distance drawn with density distance
** -distance_exponent (0: anywhere before, 1: every octave alike, 2: mostly near).

Cost per rank: with f, O(M * NB) random numbers (131,072 for 4M tokens and 4 KV heads, times 256 ranks); with
alike_tokens, O(runs * M * topk), where runs = tokens of a rank / alike_tokens.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msa_train.parallel.selection_file import Bits
from msa_train.simulate.inputs.placement import IntArray, Placement

FloatArray = NDArray[np.float64]
# Draws held at once: 32 MiB in each array of 64-bit numbers
_DRAWS = 2**22


@dataclass(kw_only=True, slots=True)
class SyntheticSelections:
    """Draw selections as the module says; one of f and alike_tokens is set.

    Example: 8 blocks on 2 contiguous ranks, one KV head, topk 2, f 0.25: rank 1 sees 4 remote blocks, rank 0
    none, so rank 1 selects 2 of its 4 and the mean over ranks is (0 + 2 / 4) / 2 = 0.25.

    Raises:
        ValueError: for parameters that are out of range or contradict each other.
    """

    num_kv_heads: int
    "M, of the model"
    topk: int
    "blocks that a query selects per KV head, of the model"
    local_blocks: int = 1
    "last blocks that every query selects, of the model"
    f: float | None = None
    "share of all remote KV blocks that a rank selects, mean over ranks, 0 to 1"
    alike_tokens: int | None = None
    "neighbouring queries that select alike; a multiple or a divisor of block_size"
    sink_blocks: int = 1
    "first blocks of a document that every query selects"
    popular_share: float = 0.5
    "share of the other draws that go to popular blocks, 0 to 1"
    popular_exponent: float = 1.0
    "Zipf exponent of popularity, 0 to 10"
    distance_exponent: float = 1.0
    "exponent of the density of distances, 0 to 10"
    seed: int = 0
    "of all draws"
    _kept: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False, compare=False)
    "what all ranks of a placement share"

    def __post_init__(self) -> None:
        if (self.f is None) == (self.alike_tokens is None):
            raise ValueError("f, alike_tokens: exactly one of them must be given")
        if self.f is not None and not 0 <= self.f <= 1:
            raise ValueError(f"f={self.f}: must be from 0 to 1")
        if self.alike_tokens is not None and self.alike_tokens < 1:
            raise ValueError(f"alike_tokens={self.alike_tokens}: must be at least 1")
        if self.sink_blocks < 0 or self.local_blocks + self.sink_blocks > self.topk:
            raise ValueError(
                f"sink_blocks={self.sink_blocks}: must be from 0 to topk - local_blocks = "
                f"{self.topk - self.local_blocks}"
            )
        if not 0 <= self.popular_share <= 1:
            raise ValueError(f"popular_share={self.popular_share}: must be from 0 to 1")
        for name in ("popular_exponent", "distance_exponent"):
            if not 0 <= getattr(self, name) <= 10:
                raise ValueError(f"{name}={getattr(self, name)}: must be from 0 to 10")

    def check(self, placement: Placement) -> None:
        """Check that the placement allows these selections.

        Raises:
            ValueError: for more of f than ranks may see, or runs that do not fit the blocks.
        """
        if self.f is not None:
            self._share(placement)
            return
        assert self.alike_tokens is not None, "one of the two is given"
        size = placement.block_size
        if self.alike_tokens % size and size % self.alike_tokens:
            raise ValueError(
                f"alike_tokens={self.alike_tokens}: must be a multiple or a divisor of block_size={size}"
            )

    def needed(self, placement: Placement, rank: int) -> Bits:
        """See Selections.needed."""
        if self.f is not None:
            return self._stated(placement, rank, self._share(placement))
        return self._chosen(placement, rank)

    def local_share(self, placement: Placement) -> FloatArray:
        """See Selections.local_share: of some of the rank's queries, drawn by the weights."""
        shares = np.empty(placement.cp_size)
        count = max(1, min(placement.order.shape[1], 4096 // placement.cp_size))
        for rank in range(placement.cp_size):
            own = placement.order[rank]
            # blocks at the middles of `count` equal parts: all depths of the rank's shard are drawn
            blocks = own[(np.arange(count) * 2 + 1) * own.shape[0] // (2 * count)]
            picks = self._draw(placement, blocks, np.arange(count) + rank * count)
            valid = picks >= 0
            local = valid & (placement.owner[np.maximum(picks, 0)] == rank)
            shares[rank] = local.sum() / valid.sum()
        return shares

    def describe(self) -> str:
        """See Selections.describe."""
        how = (
            f"f={self.f:g}"
            if self.f is not None
            else f"{self.alike_tokens} neighbouring queries choose alike"
        )
        return (
            f"synthetic: {how}, {self.local_blocks} local and {self.sink_blocks} sink blocks, "
            f"popular_share={self.popular_share:g} (exponent {self.popular_exponent:g}), distance exponent "
            f"{self.distance_exponent:g}, seed {self.seed}"
        )

    def _share(self, placement: Placement) -> float:
        """Return the share of visible remote blocks that makes f of all remote ones, mean over ranks.

        Example: 2 ranks see [0, 4] of 4 remote blocks, on average half: f 0.25 takes 0.5 of what they see.
        """
        assert self.f is not None, "called where f is given"
        key = ("share", id(placement))
        if key in self._kept:
            return self._kept[key]
        remote = placement.num_blocks - placement.num_blocks // placement.cp_size
        visible = float(placement.visible_remote().mean()) / max(remote, 1)
        if self.f > visible * (1 + 1e-9):
            raise ValueError(
                f"f={self.f}: with this layout and these documents a rank may see {visible:.3f} of the "
                "remote blocks on average, the others lie in the future; use at most that"
            )
        self._kept[key] = self.f / visible if visible else 0.0
        return self._kept[key]

    def _stated(self, placement: Placement, rank: int, share: float) -> Bits:
        """Draw by weight without replacement: the n largest of log(weight) plus Gumbel noise.

        Source: Efraimidis and Spirakis 2006 (weighted sampling), as Gumbel-top-k in Kool et al. 2019. Returns
        [M, NB] bool.
        """
        # a stream per rank: ranks can be asked in any order, and one of them alone
        rng = np.random.default_rng((self.seed, 1, placement.cp_size, rank))
        own = placement.order[rank]
        visible = np.flatnonzero(placement.visible(rank))
        result = np.zeros((self.num_kv_heads, placement.num_blocks), dtype=bool)
        result[:, own] = True
        count = int(share * visible.shape[0] + 0.5)
        if count == 0:
            return result
        # distance of a remote block to the rank's next own one, which is the nearest query that can see it
        next_own = own[np.searchsorted(own, visible)]
        near = (next_own - visible).astype(np.float32) ** np.float32(-self.distance_exponent)
        # both parts of the weights are normalised, so popular_share is their share of the sum
        near *= (1 - self.popular_share) / near.sum()
        sinks = np.isin(visible, np.unique(placement.doc_start[own])[:, None] + np.arange(self.sink_blocks))
        for group in range(self.num_kv_heads):
            popular = self._popularity(placement, group)[visible]
            weight = near + popular * (self.popular_share / popular.sum(dtype=np.float64))
            # the same order as log(weight) + Gumbel: the smallest exponentials over weights
            key = rng.standard_exponential(visible.shape[0], dtype=np.float32) / weight
            # sinks come before every draw, whose keys are positive
            key[sinks] = -1
            result[group, visible[np.argpartition(key, count - 1)[:count]]] = True
        return result

    def _popularity(self, placement: Placement, group: int) -> NDArray[np.float32]:
        """Return [NB] float32, the popularity of each block: place in the order ** -popular_exponent.

        Example: order [5, 2, 6, 0, 7, 1, 4, 3], exponent 1 -> block 5 has 1, block 2 has 0.5, block 0 has
        0.25.
        """
        key = ("popularity", placement.num_blocks, group)
        if key not in self._kept:
            position = np.empty(placement.num_blocks, dtype=np.float32)
            position[self._popular_order(placement, group)] = np.arange(1, placement.num_blocks + 1)
            self._kept[key] = position ** np.float32(-self.popular_exponent)
        return self._kept[key]

    def _popular_order(self, placement: Placement, group: int) -> IntArray:
        """Return [NB] int64, the blocks in this KV head's order, the most popular one first."""
        key = ("order", placement.num_blocks, group)
        if key not in self._kept:
            rng = np.random.default_rng((self.seed, 2, group))
            self._kept[key] = rng.permutation(placement.num_blocks)
        return self._kept[key]

    def _chosen(self, placement: Placement, rank: int) -> Bits:
        """Join what the runs of a rank's queries draw: [M, NB] bool.

        Example: blocks of 128 tokens: 256 alike -> one draw for 2 blocks, 64 alike -> two draws per block.
        """
        self.check(placement)
        assert self.alike_tokens is not None, "called where it is given"
        size, own = placement.block_size, placement.order[rank]
        if self.alike_tokens >= size:
            # a run that begins on another rank is drawn there too, with the same numbers
            run = own // (self.alike_tokens // size)
            last = np.flatnonzero(np.append(run[1:] != run[:-1], True))
            blocks, runs = own[last], run[last]
        else:
            each = size // self.alike_tokens
            blocks = own.repeat(each)
            runs = blocks * each + np.tile(np.arange(each), own.shape[0])
        # column 0 takes the draws that are -1, and is cut off in the end
        result = np.zeros((self.num_kv_heads, placement.num_blocks + 1), dtype=bool)
        result[:, own + 1] = True
        step = max(1, _DRAWS // (self.num_kv_heads * self.topk))
        for begin in range(0, blocks.shape[0], step):
            picks = self._draw(placement, blocks[begin : begin + step], runs[begin : begin + step])
            for group in range(self.num_kv_heads):
                result[group, picks[:, group].ravel() + 1] = True
        return result[:, 1:]

    def _draw(self, placement: Placement, blocks: IntArray, runs: IntArray) -> IntArray:
        """Draw [R, M, topk] blocks for [R] query blocks and run numbers, -1 where fewer are visible.

        Example: topk 3 with 1 local and 1 sink block: block 0 -> [0, -1, -1], block 1 -> [0, 1, -1], block 4
        -> [4, 0, 2], of which 2 was drawn.
        """
        start = placement.doc_start[blocks]
        before = blocks - start
        slots = self.topk - self.local_blocks - self.sink_blocks
        drawn = self._draw_slots(placement, blocks, runs, slots)
        fixed = np.concatenate(
            (
                blocks[:, None] - np.arange(self.local_blocks),
                start[:, None] + np.arange(self.sink_blocks),
            ),
            axis=1,
        )
        fixed = np.broadcast_to(fixed[:, None], (blocks.shape[0], self.num_kv_heads, fixed.shape[1]))
        picks = np.concatenate((fixed, drawn), axis=2)
        # where no more blocks are visible than there are slots, all of them are selected
        few = np.flatnonzero(before < self.topk)
        if few.size:
            every = start[few, None] + np.arange(self.topk)
            every = np.where(every <= blocks[few, None], every, -1)
            picks[few] = every[:, None]
        return picks

    def _draw_slots(self, placement: Placement, blocks: IntArray, runs: IntArray, slots: int) -> IntArray:
        """Draw the slots that are neither local nor sinks: [R, M, slots] blocks, some perhaps twice."""
        before = (blocks - placement.doc_start[blocks]).astype(np.float64)[:, None, None]
        key = (runs[:, None, None] * self.num_kv_heads + np.arange(self.num_kv_heads)[:, None]) * max(
            slots, 1
        )
        # a number of its own for each (run, KV head, slot): whoever draws for it finds the same block
        key = key + np.arange(slots)
        # channel 0 draws distances, 1 the choice between both ways, 2 the place in the order of popularity
        distance = _power_law(_uniform(key, self.seed, 0), np.maximum(before, 1), self.distance_exponent)
        picks = blocks[:, None, None] - np.minimum(distance, before).astype(np.int64)
        if self.popular_share == 0:
            return picks
        wanted = _uniform(key, self.seed, 1) < self.popular_share
        place = _power_law(_uniform(key, self.seed, 2), float(placement.num_blocks), self.popular_exponent)
        place = np.minimum(place.astype(np.int64), placement.num_blocks) - 1
        for group in range(self.num_kv_heads):
            popular = self._popular_order(placement, group)[place[:, group]]
            # what is popular but not visible to the query leaves the draw by distance
            seen = (popular <= blocks[:, None]) & (popular >= placement.doc_start[blocks][:, None])
            picks[:, group] = np.where(wanted[:, group] & seen, popular, picks[:, group])
        return picks


def _power_law(u: FloatArray, largest: FloatArray | float, exponent: float) -> FloatArray:
    """Turn uniform u into whole numbers from 1 to about `largest` with density x ** -exponent, as floats.

    Inverse of the distribution function: x = (1 + u (top^(1 - a) - 1))^(1 / (1 - a)), and top^u for a = 1.
    Example: largest 7, u = [0, 0.25, 0.5, 0.75]: a = 1 -> [1, 1, 2, 4], a = 0 -> [1, 2, 4, 6], a = 2 -> [1,
    1, 1, 2].
    """
    top = largest + 1.0
    if abs(exponent - 1) < 1e-6:
        return np.floor(top**u)
    power = 1 - exponent
    return np.floor((1 + u * (top**power - 1)) ** (1 / power))


def _uniform(key: IntArray, seed: int, channel: int) -> FloatArray:
    """Hash key, seed and channel to uniform numbers in [0, 1) by splitmix64's finaliser (Steele et al. 2014).

    Example: keys [0, 1, 2], seed 0 -> channel 0: [0.3624, 0.5871, 0.3275], 1: [0.4309, 0.0277, 0.8377].
    """
    x = key.astype(np.uint64)
    with np.errstate(over="ignore"):
        # four channels per key; multiples of the golden ratio's 64 bits spread seeds, as in splitmix64
        x = x * np.uint64(4) + np.uint64(channel)
        x ^= np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**64)
        x = (x + np.uint64(0x9E3779B97F4A7C15)) & np.uint64(2**64 - 1)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    # the upper 53 bits fill a float64's mantissa
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
