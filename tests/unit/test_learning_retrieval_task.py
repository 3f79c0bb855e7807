"""The packs of the learning benchmark: each lookup, each label and where the text comes from."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.learning.retrieval_task import (
    LookupPack,
    RetrievalTask,
    Stage,
    Symbols,
    previous_units,
)
from msa_train.data import IGNORE_LABEL
from msa_train.data.split import DocumentView
from msa_train.data.token_cache.store import TokenStore, write_store

SEQ_LEN = 512
SYMBOLS = Symbols(first=9_000, num_keys=40, num_values=8)
LENGTHS = [3, 700, 1, 900]
STAGES = (
    Stage(num_packs=2, doc_len=64, num_records=4, num_queries=16),
    Stage(num_packs=3, doc_len=256, num_records=20, num_queries=30),
    Stage(num_packs=1, doc_len=512, num_records=40, num_queries=80),
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
    assert len(packs.query) == SEQ_LEN // make.doc_len * make.num_queries


@pytest.mark.parametrize("index", [0, 3, 7])
def test_every_query_is_answered_by_earlier_units_alone(view: DocumentView, index: int) -> None:
    task = _task(view)
    make = task.stage(index)
    for tokens, labels, query, distance in _documents(task[index], make.doc_len):
        unit = _units(tokens)
        assert len(unit) == make.num_records + make.num_queries
        assert (tokens[unit + 1] >= SYMBOLS.first_value).all()
        np.testing.assert_array_equal(tokens[unit], tokens[unit + 2])
        expected_query, expected_distance = list[int](), list[int]()
        value, latest = dict[int, int](), dict[int, int]()
        for start in unit.tolist():
            key = int(tokens[start])
            if key in latest:
                expected_query.append(start)
                expected_distance.append(start - latest[key])
                assert tokens[start + 1] == labels[start] == value[key]
            value.setdefault(key, int(tokens[start + 1]))
            latest[key] = start
        assert len(value) == make.num_records
        assert query.tolist() == expected_query
        assert distance.tolist() == expected_distance


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
        expected[_units(tokens) + 1] = True
        expected[-1] = False
        np.testing.assert_array_equal(counts, expected)


def _units(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """First tokens of the units: the keys that stand before a value."""
    return np.flatnonzero(tokens[1:] >= SYMBOLS.first_value)


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


def test_queries_look_back_over_all_distances() -> None:
    rng = np.random.default_rng(0)
    distances: list[int] = []
    for _ in range(100):
        start = np.sort(rng.choice(682, 144, replace=False)) * 3
        previous = previous_units(start, 48, 2048, rng)
        query = np.flatnonzero(previous >= 0)
        assert len(query) == 96
        assert previous[0] == -1
        assert (previous[query] < query).all()
        assert len(set(previous[query].tolist())) == 96, "a unit is the latest one of its key only once"
        distances += (start[query] - start[previous[query]]).tolist()
    edges = [0, 32, 128, 256, 512, 1024, 2048]
    shares = np.histogram(distances, edges)[0] / len(distances)
    # Log-uniform from 3 to 2048 would be 0.36, 0.21, then 0.11 each. Only a late query can look back over
    # half of the document or more, and only at a key of the first records.
    assert shares.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(shares[:5], [0.36, 0.21, 0.11, 0.11, 0.11], atol=0.08)
    assert shares[5] > 0.02


def test_a_query_takes_the_key_nearest_to_the_distance_it_draws() -> None:
    start = np.array([0, 90, 99])
    drawn = [int(previous_units(start, 2, 100, np.random.default_rng(seed))[2]) for seed in range(300)]
    # Either unit 1 or unit 2 is the second record. As a query, unit 2 is 99 or 9 tokens behind the records.
    assert set(drawn) == {-1, 0, 1}
    near = drawn.count(1) / (300 - drawn.count(-1))
    # Log-uniform between 3 and 100, the border lies at sqrt(9 * 99) = 29.8: 65% are nearer to 9.
    assert 0.5 < near < 0.8


def test_without_lookups_only_text_is_left(view: DocumentView) -> None:
    stage = Stage(num_packs=1, doc_len=128, num_records=0, num_queries=0)
    packs = RetrievalTask(view, SEQ_LEN, [stage], 0, SYMBOLS)[0]
    assert len(packs.query) == len(packs.distance) == 0
    assert packs.pack.num_labels == SEQ_LEN - SEQ_LEN // 128


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ((0, 64, 1, 1), "num_packs=0: must be positive"),
        ((1, 96, 1, 1), "doc_len=96: must divide seq_len=512"),
        ((1, 64, 41, 1), "num_records=41: must be from 0 to num_keys=40"),
        ((1, 64, -1, 1), "num_records=-1: must be from 0 to num_keys=40"),
        ((1, 64, 0, 1), "num_queries=1: must be at least 0, and 0 with num_records=0"),
        ((1, 64, 1, -1), "num_queries=-1: must be at least 0"),
        ((1, 64, 11, 11), "num_records=11, num_queries=11: must fit into doc_len=64"),
    ],
)
def test_stages_that_cannot_be(view: DocumentView, stage: tuple[int, int, int, int], message: str) -> None:
    num_packs, doc_len, num_records, num_queries = stage
    wrong = Stage(num_packs=num_packs, doc_len=doc_len, num_records=num_records, num_queries=num_queries)
    with pytest.raises(ValueError, match=message):
        RetrievalTask(view, SEQ_LEN, [wrong], 0, SYMBOLS)


def test_other_errors(view: DocumentView) -> None:
    with pytest.raises(ValueError, match=r"stages=\[\]"):
        RetrievalTask(view, SEQ_LEN, [], 0, SYMBOLS)
    with pytest.raises(ValueError, match="corpus of 1604 tokens: must have at least seq_len=2048"):
        RetrievalTask(view, 2048, STAGES, 0, SYMBOLS)
    with pytest.raises(ValueError, match="num_values=0: must be positive"):
        Symbols(num_values=0)
    with pytest.raises(IndexError, match="pack -1"):
        _task(view)[-1]
