"""Packs hold every token once, aligned, with the right labels."""

import time

import numpy as np
import numpy.typing as npt
import pytest

from msa_train.data.packing import EpochPlan, best_fit, pack_documents, split_documents

SCENARIOS = {
    "one_token": [1],
    "single_tokens": [1] * 9,
    "exact_multiples": [16, 32, 64, 48],
    "longer_than_seq_len": [65, 200, 64 * 3, 1000],
    "empty_between": [5, 0, 7, 0],
    "many_short": list(range(1, 60)),
    "one_long": [10_001],
}


# Computed once; depends on nothing but numpy's raw PCG64 stream, which numpy promises to keep.
PINNED = [[4, 1], [2, 3], [7], [5, 0], [6]]


def plan_epoch(
    doc_lengths: npt.NDArray[np.int64], *, seq_len: int, block_size: int, seed: int, epoch: int
) -> EpochPlan:
    """Pack every token of every document exactly once; depends on nothing but the arguments."""
    packing = pack_documents(doc_lengths, seq_len=seq_len, block_size=block_size, seed=seed)
    return packing.epoch(epoch)


def _covered(plan: EpochPlan, lengths: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    counts = [np.zeros(length, np.int64) for length in lengths]
    for pack in range(plan.num_packs):
        pieces = plan.pieces(pack)
        for doc, start, length in zip(pieces.doc, pieces.start, pieces.length, strict=True):
            assert length > 0
            counts[doc][start : start + length] += 1
    return counts


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("block_size", [1, 8, 16, 64])
def test_every_token_once_in_every_epoch(name: str, block_size: int) -> None:
    lengths = np.array(SCENARIOS[name], np.int64)
    for epoch in range(3):
        plan = plan_epoch(lengths, seq_len=64, block_size=block_size, seed=5, epoch=epoch)
        assert all((count == 1).all() for count in _covered(plan, lengths))


@pytest.mark.parametrize("seed", range(20))
def test_random_lengths(seed: int) -> None:
    generator = np.random.default_rng(seed)
    block_size = int(generator.choice([1, 2, 4, 16]))
    seq_len = block_size * int(generator.integers(1, 12))
    lengths = generator.integers(0, 4 * seq_len, int(generator.integers(1, 80)))
    lengths[0] = 1
    plans = [plan_epoch(lengths, seq_len=seq_len, block_size=block_size, seed=seed, epoch=e) for e in (0, 1)]
    assert plans[0].num_packs == plans[1].num_packs
    for plan in plans:
        assert all((count == 1).all() for count in _covered(plan, lengths))
        for pack in range(plan.num_packs):
            blocks = -(-plan.pieces(pack).length // block_size)
            assert 0 < blocks.sum() * block_size <= seq_len


def test_worked_examples() -> None:
    pieces = split_documents(np.array([3, 10]), 8)
    assert pieces.doc.tolist() == [0, 1, 1]
    assert pieces.start.tolist() == [0, 0, 8]
    assert pieces.length.tolist() == [3, 8, 2]
    assert best_fit(np.array([2, 3, 2, 1]), 4).tolist() == [0, 1, 0, 1]


def test_best_fit_equals_plain_search() -> None:
    sizes = np.random.default_rng(3).integers(1, 33, 500)
    free: list[int] = []
    for size, pack in zip(sizes.tolist(), best_fit(sizes, 32).tolist(), strict=True):
        fits = [room for room in free if room >= size]
        if not fits:
            assert pack == len(free)
            free.append(32)
        else:
            assert free[pack] == min(fits)
        free[pack] -= size


def best_fit_of_old(sizes: list[int], capacity: int) -> list[int]:
    """The search that chose the packs of runs that still go on: one bit per free size."""
    packs: list[int] = []
    packs_with_free = [list[int]() for _ in range(capacity + 1)]
    free_mask = num_packs = 0
    for size in sizes:
        if candidates := free_mask >> size:
            free = size + (candidates & -candidates).bit_length() - 1
            pack = packs_with_free[free].pop()
            if not packs_with_free[free]:
                free_mask ^= 1 << free
        else:
            free, pack = capacity, num_packs
            num_packs += 1
        packs.append(pack)
        if rest := free - size:
            packs_with_free[rest].append(pack)
            free_mask |= 1 << rest
    return packs


@pytest.mark.parametrize("seed", range(30))
def test_best_fit_chooses_the_packs_of_old(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equally full packs included, and lists that are placed in parts."""
    monkeypatch.setattr("msa_train.data.packing._CHUNK_PIECES", 1 + seed * 7)
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 40 if seed % 2 else 2000))
    sizes = np.minimum(rng.integers(1, capacity + 1, 500), 1 + rng.lognormal(1, 2, 500).astype(np.int64))
    assert best_fit(sizes, capacity).tolist() == best_fit_of_old(sizes.tolist(), capacity)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 200)

    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        plan = plan_epoch(lengths, seq_len=128, block_size=16, seed=seed, epoch=epoch)
        pieces = [plan.pieces(pack) for pack in range(plan.num_packs)]
        return [row for p in pieces for row in zip(p.doc.tolist(), p.start.tolist(), strict=True)]

    first = order(1, 0)
    assert first == order(1, 0)
    assert first != order(1, 1)
    assert first != order(2, 0)
    assert sorted(first) == sorted(order(1, 1)) == sorted(order(2, 0))


def test_order_is_pinned() -> None:
    """A run that goes on after an upgrade must meet the same packs."""
    plan = plan_epoch(np.arange(1, 9), seq_len=8, block_size=2, seed=7, epoch=2)
    assert [plan.pieces(pack).doc.tolist() for pack in range(plan.num_packs)] == PINNED


def test_padding_is_small() -> None:
    lengths = np.random.default_rng(1).integers(1, 20_000, 20_000)
    packing = pack_documents(lengths, seq_len=8192, block_size=128, seed=0)
    aligned = -(-lengths // 128) * 128
    assert aligned.sum() / (packing.num_packs * 8192) > 0.995


def test_large_corpus_is_planned_in_seconds() -> None:
    lengths = np.random.default_rng(1).integers(1, 8192, 200_000)
    begin = time.process_time()
    plan_epoch(lengths, seq_len=8192, block_size=128, seed=0, epoch=0)
    # processor time: other work on the machine does not count
    assert time.process_time() - begin < 5, "a plan of 200,000 documents takes a third of a second"


@pytest.mark.parametrize(
    ("seq_len", "block_size", "seed", "message"),
    [
        (100, 16, 0, "data.seq_len=100: must be a positive multiple of attention.block_size=16; use .*=96"),
        (8, 16, 0, "data.seq_len=8: .*use data.seq_len=16"),
        (32, 16, -1, "data.seed=-1: must not be negative; use data.seed=1"),
    ],
)
def test_bad_settings(seq_len: int, block_size: int, seed: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_documents(np.array([5]), seq_len=seq_len, block_size=block_size, seed=seed)
