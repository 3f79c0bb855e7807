"""Prepared corpora are found again, and are whole or not there."""

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from msa_train.config import DataConfig
from msa_train.data import Corpus, cache, load_datasets, prepare, prepare_corpus
from msa_train.data.cache import DOCUMENTS_NAME, MANIFEST_NAME
from msa_train.data.listing import TAG_NAME
from msa_train.data.tokenizer import ByteTokenizer


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
    return sorted(name for name in os.listdir(tmp_path / "cache") if name != TAG_NAME)


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


def test_what_the_tokenizer_found_is_said_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteTokenizer, "findings", lambda self: ["data.tokenizer=bytes: 3 of 9 are lost"])
    for first_word in ("tokenizing", "data.tokenizer=bytes:"):
        lines: list[str] = []
        prepare_corpus(_data(tmp_path), vocab_size=300, log=lines.append)
        assert lines[0].startswith(first_word)
        assert lines.count("data.tokenizer=bytes: 3 of 9 are lost") == 1
    manifest = next(tmp_path.glob("cache/*/corpus.json"))
    content = json.loads(manifest.read_text())
    for findings in (None, 5, [7]):
        manifest.write_text(json.dumps({**content, "findings": findings}))
        prepare_corpus(_data(tmp_path), vocab_size=300, log=lines.append)


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
    (leftover / DOCUMENTS_NAME).unlink()
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

    def write_after_the_other(*arguments: object) -> dict[str, Any]:
        monkeypatch.setattr(prepare, "_write_files", write_files)
        prepare_corpus(_data(tmp_path), vocab_size=300)
        inodes.append((folders()[0] / "corpus.bin").stat().st_ino)
        return write_files(*arguments)  # pyright: ignore[reportArgumentType]

    def folders() -> list[Path]:
        return [
            path for path in (tmp_path / "cache").iterdir() if path.is_dir() and ".partial" not in path.name
        ]

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


def _zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "zeros": (_zeros, "checksum"),
    "flipped": (_flip, "checksum"),
    "cut_off": (_cut_off, "bytes instead of"),
    "empty": (lambda path: os.truncate(path, 0), "0 bytes instead of"),
    "missing": (Path.unlink, "missing"),
}


@pytest.mark.parametrize("name", ["corpus.bin", "corpus.idx", DOCUMENTS_NAME])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_cache(tmp_path: Path, name: str, kind: str) -> None:
    folder = Path(prepare_corpus(_data(tmp_path), vocab_size=300).prefix).parent
    damage, reason = DAMAGE[kind]
    damage(folder / name)
    with pytest.raises(ValueError, match=rf"data.cache_dir=.* is damaged \({name}: .*{reason}.*; remove it"):
        prepare_corpus(_data(tmp_path), vocab_size=300)
    shutil.rmtree(folder)
    assert prepare_corpus(_data(tmp_path), vocab_size=300).num_documents == 20


@pytest.mark.parametrize(
    "content", [None, b"", b"\0" * 99, b"[]", b'{"files": {}}', b'{"files": 3}', b"[" * 99_999]
)
def test_damaged_manifest(tmp_path: Path, content: bytes | None) -> None:
    path = Path(prepare_corpus(_data(tmp_path), vocab_size=300).prefix).with_name(MANIFEST_NAME)
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"data.cache_dir=.* is damaged \(.*{MANIFEST_NAME}: .*; remove it"):
        prepare_corpus(_data(tmp_path), vocab_size=300)


def test_samples_of_large_files_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "FULL_CHECK_BYTES", 10)
    first = prepare_corpus(_data(tmp_path), vocab_size=300)
    assert prepare_corpus(_data(tmp_path), vocab_size=300) == first
    _zeros(Path(first.prefix + ".bin"))
    with pytest.raises(ValueError, match=r"corpus\.bin: checksum"):
        prepare_corpus(_data(tmp_path), vocab_size=300)


def test_files_are_on_the_disk_before_they_are_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note_sync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    prepare_corpus(_data(tmp_path), vocab_size=300)
    before = events[: events.index("rename")]
    assert {"corpus.bin", "corpus.idx", DOCUMENTS_NAME, MANIFEST_NAME} <= set(before)
    assert events[-1] == "cache", "the folder's new name is on the disk too"


def test_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(prepare, "write_documents", full)
    with pytest.raises(
        ValueError, match=r"data.cache_dir=.*cannot be written \(No space left .*; give another"
    ):
        prepare_corpus(_data(tmp_path), vocab_size=300)
    assert _entries(tmp_path) == []


def test_content_is_that_of_the_tokens_and_names(tmp_path: Path) -> None:
    first = prepare_corpus(_data(tmp_path), vocab_size=300)
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "texts", moved / "texts")
    assert prepare_corpus(_data(moved), vocab_size=300).content == first.content
    (moved / "texts" / "3.txt").rename(moved / "texts" / "other.txt")
    renamed = prepare_corpus(_data(moved), vocab_size=300).content
    (moved / "texts" / "other.txt").write_text("DOCUMENT 3 " * 4)
    changed = prepare_corpus(_data(moved), vocab_size=300).content
    assert len({first.content, renamed, changed}) == 3


def test_cache_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match=r"data.cache_dir=.*cannot be created .*; give a folder"):
        prepare_corpus(_data(tmp_path), vocab_size=300)
