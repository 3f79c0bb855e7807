"""Prepared corpora are found again, and are whole or not there."""

import os
import threading
from pathlib import Path

import pytest

from msa_train.config import DataConfig
from msa_train.data import Corpus, load_datasets, prepare, prepare_corpus


def _data(tmp_path: Path, **settings: object) -> DataConfig:
    root = tmp_path / "texts"
    root.mkdir(exist_ok=True)
    for i in range(20):
        path = root / f"{i}.txt"
        if not path.exists():
            path.write_text(f"document {i} " * (i + 1))
    settings = {"corpus": str(root), "cache_dir": str(tmp_path / "cache"), "seq_len": 64, **settings}
    return DataConfig(**settings)  # pyright: ignore[reportArgumentType]


def _entries(tmp_path: Path) -> list[str]:
    return sorted(os.listdir(tmp_path / "cache"))


def test_second_time_nothing_is_tokenized(tmp_path: Path) -> None:
    lines: list[str] = []
    first = prepare_corpus(_data(tmp_path), vocab_size=300, log=lines.append)
    assert [line.split()[0] for line in lines] == ["tokenizing", "20"]
    stamp = Path(first.prefix + ".bin").stat().st_mtime_ns
    lines.clear()
    assert prepare_corpus(_data(tmp_path, seed=5), vocab_size=400, log=lines.append) == first
    assert len(lines) == 1
    assert Path(first.prefix + ".bin").stat().st_mtime_ns == stamp
    assert load_datasets(_data(tmp_path), block_size=16, vocab_size=300)[2] == first


def test_changed_files_and_settings_are_noticed(tmp_path: Path) -> None:
    prefixes = [prepare_corpus(_data(tmp_path), vocab_size=300).prefix]
    (tmp_path / "texts" / "3.txt").write_text("another text")
    prefixes.append(prepare_corpus(_data(tmp_path), vocab_size=300).prefix)
    (tmp_path / "texts" / "new.txt").write_text("new")
    prefixes.append(prepare_corpus(_data(tmp_path), vocab_size=300).prefix)
    prefixes.append(prepare_corpus(_data(tmp_path, text_field="body"), vocab_size=300).prefix)
    assert len(set(prefixes)) == len(_entries(tmp_path)) == 4


def test_leftovers_of_a_killed_process_do_not_matter(tmp_path: Path) -> None:
    first = prepare_corpus(_data(tmp_path), vocab_size=300)
    folder = Path(first.prefix).parent
    leftover = folder.with_name(folder.name + ".partial-0123")
    folder.rename(leftover)
    (leftover / "documents.npz").unlink()
    assert prepare_corpus(_data(tmp_path), vocab_size=300) == first
    assert len(_entries(tmp_path)) == 2


def test_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "z.jsonl").write_text('{"text": "good"}\nbroken\n')
    with pytest.raises(ValueError, match=r"z\.jsonl:2"):
        prepare_corpus(_data(tmp_path), vocab_size=300)
    assert _entries(tmp_path) == []


def test_the_first_of_two_processes_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one finishes while this one writes: its files stay, these are thrown away."""
    write_files = prepare._write_files  # pyright: ignore[reportPrivateUsage]

    def write_after_the_other(*arguments: object) -> None:
        monkeypatch.setattr(prepare, "_write_files", write_files)
        prepare_corpus(_data(tmp_path), vocab_size=300)
        inodes.append((folders()[0] / "corpus.bin").stat().st_ino)
        write_files(*arguments)  # pyright: ignore[reportArgumentType]

    def folders() -> list[Path]:
        return [path for path in (tmp_path / "cache").iterdir() if ".partial" not in path.name]

    inodes: list[int] = []
    monkeypatch.setattr(prepare, "_write_files", write_after_the_other)
    prepare_corpus(_data(tmp_path), vocab_size=300)
    assert len(_entries(tmp_path)) == 1
    assert (folders()[0] / "corpus.bin").stat().st_ino == inodes[0]


def test_many_at_once(tmp_path: Path) -> None:
    results: list[Corpus] = []
    data = _data(tmp_path)
    threads = [
        threading.Thread(target=lambda: results.append(prepare_corpus(data, vocab_size=300)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(result == results[0] for result in results)
    assert len(_entries(tmp_path)) == 1


def test_damaged_cache(tmp_path: Path) -> None:
    first = prepare_corpus(_data(tmp_path), vocab_size=300)
    Path(first.prefix).with_name("documents.npz").unlink()
    with pytest.raises(ValueError, match=r"data.cache_dir=.*is damaged; remove it"):
        prepare_corpus(_data(tmp_path), vocab_size=300)


def test_cache_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match=r"data.cache_dir=.*cannot be created .*; give a folder"):
        prepare_corpus(_data(tmp_path), vocab_size=300)
