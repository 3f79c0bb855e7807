"""A large corpus' packing is made once, mapped by all, and the same as in memory."""

import multiprocessing
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from msa_train.config import DataConfig
from msa_train.data import load_datasets, orders, pack_index
from msa_train.data.orders import order_of
from msa_train.data.token_cache.store import write_store
from msa_train.runtime import build_once as once
from msa_train.runtime.build_once import build_once

SEQ_LEN, BLOCK_SIZE = 64, 16


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """A .bin/.idx pair of 300 documents, some longer than a pack."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 100, rng.integers(1, 150)).astype(np.int32) for _ in range(300)]
    write_store(str(tmp_path / "c"), documents, vocab_size=100)
    return DataConfig(corpus=str(tmp_path / "c"), seq_len=SEQ_LEN, cache_dir=str(tmp_path / "cache"), seed=3)


def packs(data: DataConfig) -> list[np.ndarray]:
    """All packs of two epochs, and those of validation."""
    train, validation, _ = load_datasets(data, block_size=BLOCK_SIZE, vocab_size=100)
    assert validation is not None
    result = [train[i] for i in range(2 * train.num_packs)]
    result += [validation[i] for i in range(validation.num_packs)]
    counts = np.array([train.num_documents, train.num_tokens, validation.num_tokens])
    return [counts, *(array for p in result for array in (p.tokens, p.labels, p.cu_seqlens, p.doc_lengths))]


def test_mapped_packs_are_those_of_memory(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = packs(data)
    monkeypatch.setattr(pack_index, "MIN_DOCUMENTS", 1)
    for _ in ("written", "found again"):
        for got, want in zip(packs(data), in_memory, strict=True):
            assert np.array_equal(got, want)
        # only the first start may make it
        monkeypatch.setattr(pack_index, "_write", None)
    (folder,) = (Path(data.cache_dir) / "packs").iterdir()
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "train",
        "validation",
        "train_epoch_00000000",
        "train_epoch_00000001",
        "validation_epoch_00000000",
    }


def test_nothing_held_out(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_index, "MIN_DOCUMENTS", 1)
    data.validation_fraction = 0.0
    train, validation, _ = load_datasets(data, block_size=BLOCK_SIZE, vocab_size=100)
    assert validation is None
    assert train.view.lengths.sum() == train.num_tokens


def test_other_settings_have_other_files(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_index, "MIN_DOCUMENTS", 1)
    for seed, seq_len, fraction in ((3, 64, 0.05), (4, 64, 0.05), (3, 32, 0.05), (3, 64, 0.1)):
        data.seed, data.seq_len, data.validation_fraction = seed, seq_len, fraction
        load_datasets(data, block_size=BLOCK_SIZE, vocab_size=100)
    assert len(list((Path(data.cache_dir) / "packs").iterdir())) == 4


@pytest.mark.parametrize("name", ["begin.dat", "index.json", "pack_slots.dat"])
def test_damaged_files_are_named(data: DataConfig, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_index, "MIN_DOCUMENTS", 1)
    load_datasets(data, block_size=BLOCK_SIZE, vocab_size=100)
    (folder,) = (Path(data.cache_dir) / "packs").iterdir()
    content = bytearray((folder / "train" / name).read_bytes())
    content[20] ^= 0xFF
    for changed in (bytes(content), bytes(content[:-8]), b""):
        (folder / "train" / name).write_bytes(changed)
        with pytest.raises(ValueError, match=r"train is damaged .*; remove it, and") as error:
            load_datasets(data, block_size=BLOCK_SIZE, vocab_size=100)
        assert "\n" not in str(error.value)


def test_packs_in_memory_where_the_cache_cannot_be_written(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = packs(data)
    monkeypatch.setattr(pack_index, "MIN_DOCUMENTS", 1)
    (Path(data.cache_dir)).write_text("a file, and no folder")
    assert all(np.array_equal(a, b) for a, b in zip(packs(data), want, strict=True))


@pytest.mark.parametrize("bits", [8, 20, 33, 64])
def test_order_is_that_of_a_stable_sort(bits: int) -> None:
    rng = np.random.default_rng(bits)
    for count in (0, 10, 70_000):
        keys = rng.integers(0, 1 << bits, count, dtype=np.uint64)
        # many ties in the upper halves, some of them whole
        for some in (keys, keys // np.uint64(3) * np.uint64(3), keys & np.uint64(0xFFF00000000003)):
            assert np.array_equal(order_of(some), np.argsort(some, kind="stable"))


def test_shuffle_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = orders.shuffled(100_000, 1, 2, 3)
    monkeypatch.setattr(orders, "_IN_PARTS", 1000)
    assert np.array_equal(orders.shuffled(100_000, 1, 2, 3), whole)


def _make_slowly(folder: str, made: str) -> None:
    def make() -> None:
        with open(made, "a") as stream:
            stream.write("x")
        time.sleep(0.3)
        Path(folder).mkdir()

    build_once(Path(folder), make)
    assert Path(folder).exists()


def test_one_of_many_processes_makes_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = (str(tmp_path / "target"), str(tmp_path / "made"))
    processes = [context.Process(target=_make_slowly, args=arguments) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert (tmp_path / "made").read_text() == "x"
    assert not (tmp_path / "target.lock").exists()


def test_lock_of_a_dead_process_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once, "STALE_S", 0.3)
    (tmp_path / "target.lock").touch()
    build_once(tmp_path / "target", lambda: (tmp_path / "target").mkdir())
    assert not (tmp_path / "target.lock").exists()


def test_failure_frees_the_lock(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError("full")

    before = threading.active_count()
    with pytest.raises(OSError, match="full"):
        build_once(tmp_path / "target", fail)
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == before
