"""Packs from real token files, and the share of each data-parallel rank."""

import itertools
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from msa_train.data import IGNORE_LABEL, BatchStream, Pack, PackedDataset
from msa_train.data.split import DocumentView
from msa_train.data.token_cache.store import TokenStore, write_store

SEQ_LEN, BLOCK_SIZE, EOD = 64, 16, 65_000
LENGTHS = [1, 2, 16, 17, 63, 64, 65, 200, 256, 5]


def _view(tmp_path: Path, vocab_size: int = 70_000) -> tuple[DocumentView, list[npt.NDArray[np.int32]]]:
    """Documents whose tokens are all different, so that each tells where it comes from."""
    edges = np.cumsum([0, *LENGTHS])
    spans = itertools.pairwise(edges)
    documents = [np.append(np.arange(a + 1, b), EOD).astype(np.int32) for a, b in spans]
    write_store(str(tmp_path / "c"), documents, vocab_size=70_000)
    store = TokenStore(str(tmp_path / "c"), corpus="c")
    return DocumentView(store, store.begin, store.lengths, vocab_size), documents


def _dataset(tmp_path: Path, seed: int = 1) -> PackedDataset:
    return PackedDataset(_view(tmp_path)[0], seq_len=SEQ_LEN, block_size=BLOCK_SIZE, seed=seed)


def test_tokens_and_labels_across_splits(tmp_path: Path) -> None:
    view, documents = _view(tmp_path)
    dataset = PackedDataset(view, seq_len=SEQ_LEN, block_size=BLOCK_SIZE, seed=1)
    next_token = {int(a): int(b) for doc in documents for a, b in itertools.pairwise(doc)}
    seen: list[int] = []
    num_labels = 0
    for index in range(dataset.num_packs):
        pack = dataset[index]
        _check_shape(pack)
        num_labels += pack.num_labels
        real = _real_positions(pack)
        seen += pack.tokens[real].tolist()
        for token, label in zip(pack.tokens[real], pack.labels[real], strict=True):
            assert label == (IGNORE_LABEL if token == EOD else next_token[int(token)])
        assert (pack.tokens[~real] == 0).all()
        assert (pack.labels[~real] == IGNORE_LABEL).all()
    assert sorted(seen) == sorted(int(token) for doc in documents for token in doc)
    assert num_labels == sum(LENGTHS) - len(LENGTHS), "nothing but the last token lacks a label"
    assert dataset.num_tokens == sum(LENGTHS)


def _check_shape(pack: Pack) -> None:
    assert pack.tokens.dtype == pack.labels.dtype == np.int64
    assert pack.cu_seqlens.dtype == pack.doc_lengths.dtype == np.int32
    assert pack.tokens.shape == pack.labels.shape == (SEQ_LEN,)
    assert pack.cu_seqlens[0] == 0
    assert pack.cu_seqlens[-1] == SEQ_LEN
    assert (pack.cu_seqlens % BLOCK_SIZE == 0).all()
    assert len(pack.cu_seqlens) == len(pack.doc_lengths) + 1
    assert (pack.doc_lengths >= 1).all()
    assert (pack.doc_lengths <= np.diff(pack.cu_seqlens)).all()
    assert pack.padding_share == pytest.approx(1 - pack.doc_lengths.sum() / SEQ_LEN)


def _real_positions(pack: Pack) -> npt.NDArray[np.bool_]:
    real = np.zeros(SEQ_LEN, np.bool_)
    for start, length in zip(pack.cu_seqlens[:-1], pack.doc_lengths, strict=True):
        real[start : start + length] = True
    return real


def test_padding_share_is_that_of_the_packs(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path)
    shares = [dataset[index].padding_share for index in range(dataset.num_packs)]
    assert dataset.padding_share == pytest.approx(np.mean(shares))


def test_epochs_hold_the_same_tokens_in_another_order(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path)
    count = dataset.num_packs
    epochs = [[dataset[epoch * count + i].tokens for i in range(count)] for epoch in range(3)]
    assert not all(np.array_equal(a, b) for a, b in zip(epochs[0], epochs[1], strict=True))
    first = np.sort(np.concatenate(epochs[0]))
    assert all(np.array_equal(first, np.sort(np.concatenate(epoch))) for epoch in epochs)


def test_access_in_any_order(tmp_path: Path) -> None:
    dataset, other = _dataset(tmp_path), _dataset(tmp_path)
    indices = np.random.default_rng(0).permutation(6 * dataset.num_packs)
    shuffled = {int(index): dataset[int(index)].tokens for index in indices}
    assert all(np.array_equal(shuffled[index], other[index].tokens) for index in sorted(shuffled))
    with pytest.raises(IndexError):
        dataset[-1]


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("prefetch", [False, True])
def test_order_does_not_depend_on_ranks(tmp_path: Path, dp_size: int, prefetch: bool) -> None:
    batch, dataset = 12, _dataset(tmp_path)
    streams = [BatchStream(_dataset(tmp_path), prefetch=prefetch) for _ in range(dp_size)]
    for step in (0, 1, 2, 7, 8):
        shares = [stream.packs(step * batch, rank, dp_size, batch) for rank, stream in enumerate(streams)]
        for j in range(batch):
            got = shares[j % dp_size][j // dp_size]
            assert np.array_equal(got.tokens, dataset[step * batch + j].tokens)
    for stream in streams:
        stream.close()


class _Failing:
    """Stands for a data set whose files break after the first step."""

    def __init__(self, dataset: PackedDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Pack:
        if index >= 2:
            raise ValueError(f"pack {index} is broken")
        return self.dataset[index]


def test_errors_of_the_thread_reach_the_caller_in_their_step(tmp_path: Path) -> None:
    failing = _Failing(_dataset(tmp_path))
    with BatchStream(failing) as stream:  # pyright: ignore[reportArgumentType]
        assert len(stream.packs(0, 0, 1, 2)) == 2
        with pytest.raises(ValueError, match="pack 2 is broken"):
            stream.packs(2, 0, 1, 2)
        assert len(stream.packs(0, 0, 1, 2)) == 2


def test_close_ends_the_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    stream = BatchStream(_dataset(tmp_path))
    stream.packs(0, 0, 1, 2)
    assert threading.active_count() == before + 1
    stream.close()
    stream.close()
    assert threading.active_count() == before
    assert len(stream.packs(2, 0, 1, 2)) == 2


def test_token_outside_the_vocabulary_is_found_when_a_pack_is_built(tmp_path: Path) -> None:
    view, _ = _view(tmp_path, vocab_size=1000)
    dataset = PackedDataset(view, seq_len=SEQ_LEN, block_size=BLOCK_SIZE, seed=1)
    with pytest.raises(ValueError, match=r"data.corpus=c: .* token id 65000, but model.vocab_size=1000"):
        list(map(dataset.__getitem__, range(dataset.num_packs)))
