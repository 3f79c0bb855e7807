"""The packs of the learning benchmark: each lookup, each label and where the text comes from."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.learning.retrieval_task import (
    UNIT_TOKENS,
    LookupPack,
    RetrievalTask,
    Stage,
    Symbols,
    pair_units,
)
from msa_train.data import IGNORE_LABEL
from msa_train.data.split import DocumentView
from msa_train.data.store import TokenStore, write_store

SEQ_LEN = 512
SYMBOLS = Symbols(first=9_000, num_keys=40, num_values=8)
LENGTHS = [3, 700, 1, 900]
STAGES = (
    Stage(num_packs=2, doc_len=64, num_lookups=16),
    Stage(num_packs=3, doc_len=256, num_lookups=20),
    Stage(num_packs=1, doc_len=512, num_lookups=40),
)


@pytest.fixture
def view(tmp_path: Path) -> DocumentView:
    """Text in which every token is one more than the token before it, over document borders too."""
    edges = np.cumsum([0, *LENGTHS])
    documents = [np.arange(a, b, dtype=np.int32) for a, b in itertools.pairwise(edges)]
    write_store(str(tmp_path / "c"), documents, vocab_size=SYMBOLS.vocab_size)
    store = TokenStore(str(tmp_path / "c"), corpus="c")
    return DocumentView(store, store.begin, store.lengths, SYMBOLS.vocab_size)


def _task(view: DocumentView, seed: int = 3) -> RetrievalTask:
    return RetrievalTask(view, SEQ_LEN, STAGES, seed, SYMBOLS)


def _documents(packs: LookupPack, doc_len: int) -> Iterator[tuple[npt.NDArray[np.int64], ...]]:
    """Tokens, labels, queries (counted from the document's start) and distances of each document."""
    for start in range(0, SEQ_LEN, doc_len):
        here = (packs.query >= start) & (packs.query < start + doc_len)
        rows = slice(start, start + doc_len)
        yield (
            packs.pack.tokens[rows],
            packs.pack.labels[rows],
            packs.query[here] - start,
            packs.distance[here],
        )


@pytest.mark.parametrize(("index", "stage"), [(0, 0), (1, 0), (2, 1), (4, 1), (5, 2), (99, 2)])
def test_stage_of_each_pack(view: DocumentView, index: int, stage: int) -> None:
    task, make = _task(view), STAGES[stage]
    packs = task[index]
    assert task.stage(index) is make
    assert packs.pack.cu_seqlens.tolist() == list(range(0, SEQ_LEN + 1, make.doc_len))
    assert (packs.pack.doc_lengths == make.doc_len).all()
    assert packs.pack.tokens.shape == packs.pack.labels.shape == (SEQ_LEN,)
    assert len(packs.query) == SEQ_LEN // make.doc_len * make.num_lookups


@pytest.mark.parametrize("index", [0, 3, 7])
def test_every_query_is_answered_by_its_record_alone(view: DocumentView, index: int) -> None:
    task = _task(view)
    make = task.stage(index)
    for tokens, labels, query, distance in _documents(task[index], make.doc_len):
        record = query - distance
        assert (np.diff(query) > 0).all()
        assert (distance >= UNIT_TOKENS).all()
        assert (record >= 0).all()
        np.testing.assert_array_equal(tokens[query], tokens[record])
        np.testing.assert_array_equal(tokens[query + 1], tokens[record + 1])
        np.testing.assert_array_equal(labels[query], tokens[record + 1])
        is_key = (tokens >= SYMBOLS.first) & (tokens < SYMBOLS.first_value)
        is_value = tokens >= SYMBOLS.first_value
        assert sorted([*record, *query]) == np.flatnonzero(is_key).tolist()
        assert sorted([*record + 1, *query + 1]) == np.flatnonzero(is_value).tolist()
        assert len(set(tokens[record].tolist())) == make.num_lookups, "no key stands for two values"


@pytest.mark.parametrize("index", [0, 3, 7])
def test_labels_are_what_can_be_known(view: DocumentView, index: int) -> None:
    task = _task(view)
    make = task.stage(index)
    for tokens, labels, query, _ in _documents(task[index], make.doc_len):
        following = np.append(tokens[1:], IGNORE_LABEL)
        counts = labels != IGNORE_LABEL
        np.testing.assert_array_equal(labels[counts], following[counts])
        expected = following < SYMBOLS.first
        expected[query] = True
        expected[-1] = False
        np.testing.assert_array_equal(counts, expected)


@pytest.mark.parametrize("index", [2, 7])
def test_text_is_one_stretch_of_the_corpus(view: DocumentView, index: int) -> None:
    task = _task(view)
    make = task.stage(index)
    for tokens, _, _, _ in _documents(task[index], make.doc_len):
        text = tokens[tokens < SYMBOLS.first]
        assert len(text) == make.text_len > 0
        np.testing.assert_array_equal((text[1:] - text[:-1]) % sum(LENGTHS), 1)


def test_packs_depend_on_seed_and_number_alone(view: DocumentView) -> None:
    first, again = _task(view), _task(view)
    again[5]
    for index in (4, 0, 4):
        a, b = first[index], again[index]
        for name in ("tokens", "labels", "cu_seqlens", "doc_lengths"):
            np.testing.assert_array_equal(getattr(a.pack, name), getattr(b.pack, name))
        np.testing.assert_array_equal(a.distance, b.distance)
    assert (first[2].pack.tokens != first[3].pack.tokens).any()
    assert (first[2].pack.tokens != _task(view, seed=4)[2].pack.tokens).any()


def test_pairs_take_each_unit_once_at_all_distances() -> None:
    rng = np.random.default_rng(0)
    distances: list[int] = []
    for _ in range(200):
        start = np.sort(rng.choice(1024, 128, replace=False)) * 2
        record, query = pair_units(start, 2048, rng)
        assert (record < query).all()
        assert sorted([*record, *query]) == list(range(128))
        distances += (start[query] - start[record]).tolist()
    edges = [2, 32, 128, 256, 512, 1024, 2048]
    shares = np.histogram(distances, edges)[0] / len(distances)
    # An even spread over the logarithm would give 0.4, 0.2 and then 0.1 each; units are too far apart for
    # the shortest distances, and a document has less room for the longest.
    assert shares.sum() == pytest.approx(1.0)
    assert shares.min() > 0.04
    assert shares.max() < 0.4


def test_pairs_of_an_example() -> None:
    start = np.array([0, 10, 20, 30])
    for seed in range(20):
        record, query = pair_units(start, 40, np.random.default_rng(seed))
        assert sorted([*record, *query]) == [0, 1, 2, 3]
        assert (record < query).all()


def test_without_lookups_only_text_is_left(view: DocumentView) -> None:
    task = RetrievalTask(view, SEQ_LEN, [Stage(num_packs=1, doc_len=128, num_lookups=0)], 0, SYMBOLS)
    packs = task[0]
    assert len(packs.query) == len(packs.distance) == 0
    assert packs.pack.num_labels == SEQ_LEN - SEQ_LEN // 128


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Stage(num_packs=0, doc_len=64, num_lookups=1), "num_packs=0: must be positive"),
        (Stage(num_packs=1, doc_len=96, num_lookups=1), "doc_len=96: must divide seq_len=512"),
        (Stage(num_packs=1, doc_len=64, num_lookups=17), "num_lookups=17: must be from 0 to 16"),
        (Stage(num_packs=1, doc_len=512, num_lookups=41), "num_lookups=41: must be from 0 to 40"),
        (Stage(num_packs=1, doc_len=512, num_lookups=-1), "num_lookups=-1: must be from 0 to 40"),
    ],
)
def test_stages_that_cannot_be(view: DocumentView, stage: Stage, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetrievalTask(view, SEQ_LEN, [stage], 0, SYMBOLS)


def test_other_errors(view: DocumentView) -> None:
    with pytest.raises(ValueError, match=r"stages=\[\]"):
        RetrievalTask(view, SEQ_LEN, [], 0, SYMBOLS)
    with pytest.raises(ValueError, match="corpus of 1604 tokens: must have at least seq_len=2048"):
        RetrievalTask(view, 2048, STAGES, 0, SYMBOLS)
    with pytest.raises(ValueError, match="num_values=0: must be positive"):
        Symbols(num_values=0)
    with pytest.raises(IndexError, match="pack -1"):
        _task(view)[-1]
