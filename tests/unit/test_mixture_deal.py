"""Packs are dealt in exact shares, in an order that follows from the number alone."""

from fractions import Fraction

import numpy as np
import pytest

from msa_train.config.mixture.settings import SourceWeight
from msa_train.data.mixture.deal import TURN, PackDeal
from msa_train.data.mixture.packs import PartName, PartSize, pack_shares

SHARES = [Fraction(1, 2), Fraction(0), Fraction(1, 3), Fraction(3, 20), Fraction(1, 60)]


def test_every_pack_has_one_owner_and_numbers_go_up_by_one() -> None:
    deal = PackDeal(SHARES, seed=3)
    seen = [0] * len(SHARES)
    for index in range(TURN - 500, TURN):
        part, number = deal.locate(index)
        if index == TURN - 500:
            seen = deal.counts(index)
        assert number == seen[part]
        seen[part] += 1
    for index in range(TURN, TURN + 500):
        part, number = deal.locate(index)
        assert number == seen[part]
        seen[part] += 1
    assert seen == deal.counts(TURN + 500)
    assert seen[1] == 0


@pytest.mark.parametrize("num_packs", [1, 7, 100, TURN, 3 * TURN + 17])
def test_any_beginning_has_its_shares(num_packs: int) -> None:
    counts = PackDeal(SHARES, seed=3).counts(num_packs)
    assert sum(counts) == num_packs
    assert all(abs(count - share * num_packs) <= 2 for count, share in zip(counts, SHARES, strict=True))


def test_a_share_below_one_pack_per_turn_is_not_lost() -> None:
    tiny = Fraction(1, 10 * TURN)
    counts = PackDeal([tiny, 1 - tiny], seed=0).counts(100 * TURN)
    assert counts[0] == 10


def test_order_depends_on_seed_and_salt_and_not_on_what_was_asked_before() -> None:
    places = np.random.default_rng(0).permutation(5 * TURN)[:300]
    deal, other = PackDeal(SHARES, seed=3), PackDeal(SHARES, seed=3)
    by_place = {int(place): deal.locate(int(place)) for place in places}
    assert all(by_place[place] == other.locate(place) for place in sorted(by_place))
    for changed in (PackDeal(SHARES, seed=4), PackDeal(SHARES, seed=3, salt=1)):
        assert [changed.locate(i) for i in range(50)] != [deal.locate(i) for i in range(50)]


def test_first_packs_are_those_that_runs_have_seen() -> None:
    # a run that goes on must find the order that it began with: never change these
    deal = PackDeal([Fraction(1, 2), Fraction(1, 4), Fraction(1, 4)], seed=1234)
    first = [0, 2, 0, 1, 0, 1, 2, 0, 0, 0, 2, 1, 2, 0, 1, 0]
    assert [deal.locate(i)[0] for i in range(16)] == first


def test_weights_are_shares_of_tokens() -> None:
    half_full, full = PartSize(10, 500, 10), PartSize(10, 1000, 10)
    names = PartName("a", "under_8K"), PartName("b", "under_8K")
    weights = {"a": SourceWeight(weight=1), "b": SourceWeight(weight=1)}
    shares = pack_shares(weights, dict(zip(names, (half_full, full), strict=True)))
    assert shares == {names[0]: Fraction(2, 3), names[1]: Fraction(1, 3)}


def test_buckets_have_the_shares_that_are_given_or_those_there_are() -> None:
    sizes = {
        PartName("a", "under_8K"): PartSize(10, 300, 1),
        PartName("a", "over_512K"): PartSize(1, 100, 1),
        PartName("b", "8K-32K"): PartSize(1, 100, 1),
        PartName("b", "32K-128K"): PartSize(1, 100, 1),
        PartName("c", "under_8K"): PartSize(1, 100, 1),
    }
    weights = {"a": SourceWeight(weight=1), "b": SourceWeight(weight=3, buckets={"32K-128K": 0.5})}
    shares = pack_shares(weights, sizes)
    assert PartName("c", "under_8K") not in shares
    assert PartName("b", "8K-32K") not in shares
    # 1/4 of the tokens is a's, 3/16 and 1/16 by what it has, in packs of 300 and 100 tokens
    tokens = {name: share * sizes[name].num_tokens / sizes[name].num_packs for name, share in shares.items()}
    total = sum(tokens.values(), Fraction(0))
    assert {name.bucket: value / total for name, value in tokens.items()} == {
        "under_8K": Fraction(3, 16),
        "over_512K": Fraction(1, 16),
        "32K-128K": Fraction(3, 4),
    }
