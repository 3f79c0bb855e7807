"""Which files belong to a corpus: links, globs, caches of others, and what runs leave behind."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from launchers.local.launch_checks import check_files
from launchers.local.run_dir import claim_run_dir
from msa_train.checkpoint.data_record import handed_on
from msa_train.config import DataConfig, RunConfig
from msa_train.data import prepare_corpus
from msa_train.data.corpora.listing import RUN_MARK, split_glob
from msa_train.data.corpora.sources import find_source
from msa_train.runtime.fencing import GENERATION_NAME

RECORD = b'{"text": "a record"}\n'


def _write(root: Path, *names: str, content: bytes = b"text") -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _names(corpus: object, own: list[str] | None = None) -> list[str]:
    return [file.name for file in find_source(str(corpus), own or []).files]


def _message(corpus: object, own: list[str] | None = None) -> str:
    with pytest.raises(ValueError) as caught:
        find_source(str(corpus), own or [])
    message = str(caught.value)
    assert message.startswith(f"data.corpus={corpus}: ")
    assert message.isprintable()
    assert ";" in message
    return message


@pytest.mark.parametrize("name", ["c.json", "c.ndjson", "c.JSONL", "c.Jsonl", "c.jsonlines", "C.JSONL"])
def test_records_by_any_name(tmp_path: Path, name: str) -> None:
    _write(tmp_path, name, content=RECORD * 50)
    data = DataConfig(corpus=str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
    corpus = prepare_corpus(data, vocab_size=257)
    assert (corpus.num_documents, corpus.num_bytes) == (50, 50 * len("a record"))
    assert "(1 of records): 50 documents" in corpus.description


def test_what_was_found_is_said(tmp_path: Path) -> None:
    _write(tmp_path, "a.jsonl", "b.json.gz", content=RECORD)
    _write(tmp_path, "c.txt", "run/config.yaml", f"run/{RUN_MARK}")
    (tmp_path / "d.txt").symlink_to("c.txt")
    told = "(2 of records, 1 of plain text; left out: 1 more path(s) to the same files, "
    assert find_source(str(tmp_path)).description.endswith(told + "1 folder(s) of runs or caches)")


def test_a_file_with_several_names_counts_once(tmp_path: Path) -> None:
    _write(tmp_path, "blob", content=RECORD)
    _write(tmp_path, "z.txt")
    (tmp_path / "link.jsonl").symlink_to("blob")
    os.link(tmp_path / "z.txt", tmp_path / "hard.txt")
    (tmp_path / "again").symlink_to(tmp_path)
    assert _names(tmp_path) == ["hard.txt", "link.jsonl"]
    assert _names(f"{tmp_path}/**/*") == ["hard.txt", "link.jsonl"]


def test_copies_are_no_links(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        _write(tmp_path, name)
        os.utime(tmp_path / name, ns=(1, 1))
    assert _names(tmp_path) == ["a.txt", "b.txt"]


def _hub(root: Path, revisions: int) -> Path:
    folder = root / "hub" / "datasets--a--b"
    for i in range(revisions):
        _write(folder, f"blobs/{i}abc", content=RECORD * (i + 1))
        (folder / f"snapshots/r{i}").mkdir(parents=True)
        (folder / f"snapshots/r{i}/train.jsonl").symlink_to(f"../../blobs/{i}abc")
    _write(folder, "refs/main", content=b"r0")
    return folder


@pytest.mark.parametrize("revisions", [1, 3])
def test_cache_of_hugging_face_has_every_record_once(tmp_path: Path, revisions: int) -> None:
    folder = _hub(tmp_path, revisions)
    assert _names(folder) == ["snapshots/r0/train.jsonl"]
    assert _names(tmp_path / "hub") == ["datasets--a--b/snapshots/r0/train.jsonl"]
    assert _names(f"{tmp_path}/hub/**/*.jsonl") == ["datasets--a--b/snapshots/r0/train.jsonl"]


def test_cache_of_hugging_face_whose_revision_is_unknown(tmp_path: Path) -> None:
    folder = _hub(tmp_path, 2)
    (folder / "refs" / "main").write_bytes(b"../../..\xff")
    assert "holds 2 revisions and refs/main names none" in _message(folder)


def test_globs_end_in_spite_of_links_that_cross(tmp_path: Path) -> None:
    """With two links to the top the ways double with every level."""
    _write(tmp_path / "texts", "a.txt", "sub/b.txt")
    for link in ("texts/one", "texts/two", "texts/sub/three"):
        (tmp_path / link).symlink_to(tmp_path / "texts")
    assert _names(f"{tmp_path}/texts/**/*.txt") == ["a.txt", "sub/b.txt"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["a.txt", "d[1].txt"]),
        ("**", ["a.txt", "b/c.txt", "b/d/e.md", "d[1].txt", "d[1]/f.txt"]),
        ("**/**/*.txt", ["a.txt", "b/c.txt", "d[1].txt", "d[1]/f.txt"]),
        ("*/*.txt", ["b/c.txt", "d[1]/f.txt"]),
        ("b/**/e.md", ["d/e.md"]),
        ("[ab]/**", ["b/c.txt", "b/d/e.md"]),
        ("d[1]/*.txt", ["f.txt"]),
        ("?[1].txt", []),
        ("b/d*/*", ["d/e.md"]),
        (".h*/*", [".hidden/g.txt"]),
        ("*/.x*", ["b/.x.txt"]),
    ],
)
def test_globs(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    _write(tmp_path, "a.txt", "b/c.txt", "b/d/e.md", "d[1].txt", "d[1]/f.txt", ".hidden/g.txt", "b/.x.txt")
    if expected:
        assert _names(f"{tmp_path}/{pattern}") == expected
    else:
        assert "matches no file" in _message(f"{tmp_path}/{pattern}")


def test_parts_of_a_glob(tmp_path: Path) -> None:
    assert split_glob(tmp_path / "*" / "a.txt") == (tmp_path, ("*", "a.txt"))
    assert split_glob(Path("*.txt")) == (Path(), ("*.txt",))
    assert split_glob(tmp_path / "none" / "**") == (tmp_path / "none", ("**", "*"))


def _folder(root: Path) -> object:
    return root


def _deep_glob(root: Path) -> object:
    return root / "**" / "*.txt"


def _flat_glob(root: Path) -> object:
    return root / "*" / "*.txt"


@pytest.mark.parametrize("corpus", [_folder, _deep_glob, _flat_glob])
def test_a_folder_that_cannot_be_read_is_not_passed_over(
    tmp_path: Path, corpus: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path, "a/a.txt", "shut/b.txt")
    scandir = os.scandir

    def refuse(path: str) -> object:
        # root may read everything, so that taking rights away shows nothing in its tests
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "shut cannot be read (Permission denied)" in _message(corpus(tmp_path))


def test_deeply_nested_folders(tmp_path: Path) -> None:
    folder = tmp_path
    for _ in range(400):
        folder = folder / "d"
    _write(folder, "a.txt")
    assert _names(tmp_path) == ["d/" * 400 + "a.txt"]


def test_names_that_do_harm_to_a_terminal_are_spelled_out(tmp_path: Path) -> None:
    name = "\x1b]0;x\x07\nmsa-train: error: \u202e.txt"
    _write(tmp_path, name, content=b"\0")
    data = DataConfig(corpus=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError) as caught:
        prepare_corpus(data, vocab_size=257)
    assert r"\x1b]0;x\x07\nmsa-train: error: \u202e.txt is not text" in str(caught.value)


@pytest.mark.parametrize("place", ["runs/mine", "cache"])
def test_own_folders_inside_the_corpus_are_no_data(tmp_path: Path, place: str) -> None:
    """The first start, its workers and a second start see the same documents."""
    root = tmp_path / "texts"
    _write(root, *(f"{i}.txt" for i in range(7)), content=b"seven documents " * 30)
    config = RunConfig(run_dir=str(root / "runs" / "mine"))
    config.data = DataConfig(corpus=str(root), cache_dir=str(root / "cache"), seq_len=256)
    config.model.vocab_size = 257
    contents: set[str] = set()
    for _ in range(3):
        with claim_run_dir(config.run_dir):
            check_files(config, say=lambda _: None, hand_on=True)
            given = handed_on(config)
            assert given is not None
            assert given[0].num_documents == 7
            contents.add(given[0].content)
            _write(root / place, "config.yaml", "metrics.jsonl", "logs/rank1.err")
    assert len(contents) == 1
    assert len(_names(root)) == 7, "those of other runs neither"


def test_the_folder_of_a_run_is_no_corpus(tmp_path: Path) -> None:
    assert RUN_MARK == GENERATION_NAME
    _write(tmp_path, "a.txt", "sub/b.txt")
    assert _names(tmp_path) == ["a.txt", "sub/b.txt"]
    assert "is the folder of a run or a cache" in _message(tmp_path, [str(tmp_path)])
    assert "is the folder of a run or a cache" in _message(f"{tmp_path}/*.txt", [str(tmp_path)])
    _write(tmp_path, RUN_MARK)
    assert "is the folder of a run or a cache" in _message(tmp_path)
    assert _names(tmp_path / "sub") == ["b.txt"], "a folder that is named is taken"
    assert _names(tmp_path / "a.txt") == ["a.txt"]


def test_devices_and_pipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "link").symlink_to("/dev/zero")
    for corpus in ("/dev/zero", "/dev/null", tmp_path / "pipe.jsonl", tmp_path / "link", tmp_path):
        assert "is not a regular file but a pipe or a device" in _message(corpus)
    (tmp_path / "self").symlink_to("self")
    assert "self cannot be read" in _message(tmp_path / "self")


def test_same_size_and_time_but_other_text(tmp_path: Path) -> None:
    """Copying tools set times back; what was tokenized of the old text is not taken for the new one's."""
    data = DataConfig(corpus=str(tmp_path / "a.txt"), cache_dir=str(tmp_path / "cache"))
    contents: set[str] = set()
    for text in (b"one text", b"two text"):
        _write(tmp_path, "a.txt", content=text)
        os.utime(tmp_path / "a.txt", ns=(10**18, 10**18))
        contents.add(prepare_corpus(data, vocab_size=257).content)
    assert len(contents) == 2
