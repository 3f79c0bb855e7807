"""Held-out documents."""

from pathlib import Path

import numpy as np
import pytest

from msa_train.data.split import choose_held_out, hash_indices, hash_name, split_store
from msa_train.data.token_cache.store import TokenStore, write_store


def _store(tmp_path: Path, lengths: list[int]) -> TokenStore:
    documents = [np.full(length, i, np.int32) for i, length in enumerate(lengths)]
    write_store(str(tmp_path / "c"), documents, vocab_size=1000)
    return TokenStore(str(tmp_path / "c"), corpus="c")


def test_share_of_many_documents() -> None:
    lengths = np.ones(100_000, np.int64)
    for fraction in (0.01, 0.05, 0.5):
        share = choose_held_out(hash_indices(100_000), lengths, fraction).mean()
        assert share == pytest.approx(fraction, rel=0.1)


def test_side_of_a_document_does_not_depend_on_the_others() -> None:
    names = [f"folder/{i}.txt" for i in range(2000)]
    hashes = np.array([hash_name(name) for name in names], np.uint64)
    lengths = np.full(2000, 10)
    whole = choose_held_out(hashes, lengths, 0.1)
    assert np.array_equal(whole[:1500], choose_held_out(hashes[:1500], lengths[:1500], 0.1))


@pytest.mark.parametrize("fraction", [1e-9, 0.05, 0.5, 0.999])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_both_sides_have_a_document(fraction: float, count: int) -> None:
    held_out = choose_held_out(hash_indices(count), np.arange(1, count + 1), fraction)
    assert 0 < held_out.sum() < count


def test_unequal_documents_lose_about_the_share_of_tokens() -> None:
    lengths = np.random.default_rng(0).pareto(0.7, 120).astype(np.int64) + 1
    held_out = choose_held_out(hash_indices(120), lengths, 0.05)
    assert 0.025 <= lengths[held_out].sum() / lengths.sum() <= 0.1


def test_no_fraction_no_validation(tmp_path: Path) -> None:
    store = _store(tmp_path, [3, 4, 5])
    train, validation = split_store(store, hash_indices(3), fraction=0, vocab_size=10)
    assert validation is None
    assert train.lengths.tolist() == [3, 4, 5]


def test_views_part_the_documents(tmp_path: Path) -> None:
    store = _store(tmp_path, [3, 0, 5, 7])
    train, validation = split_store(store, hash_indices(4), fraction=0.3, vocab_size=10)
    assert validation is not None
    tokens = [
        view.read(doc, 0, 100).tolist() for view in (train, validation) for doc in range(len(view.lengths))
    ]
    assert sorted(tokens) == [[0] * 3, [2] * 5, [3] * 7]


def test_single_document_gives_its_tail(tmp_path: Path) -> None:
    write_store(str(tmp_path / "c"), [np.arange(100, dtype=np.int32)], vocab_size=1000)
    store = TokenStore(str(tmp_path / "c"), corpus="c")
    train, validation = split_store(store, hash_indices(1), fraction=0.1, vocab_size=1000)
    assert validation is not None
    assert train.read(0, 0, 1000).tolist() == list(range(90))
    assert validation.read(0, 0, 1000).tolist() == list(range(90, 100))


def test_document_too_short_to_part(tmp_path: Path) -> None:
    train, validation = split_store(_store(tmp_path, [3]), hash_indices(1), fraction=0.5, vocab_size=10)
    assert validation is None
    assert train.lengths.tolist() == [3]
