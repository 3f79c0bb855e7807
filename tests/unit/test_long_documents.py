"""Long documents: files in the order of their imports, chapters by number, chains of topics."""

import json
from pathlib import Path

import pytest

from launchers.data import main
from msa_train.config import DataConfig
from msa_train.data import load_datasets, prepare_corpus
from msa_train.data.long_documents.imports import Repository, dependency_order
from msa_train.data.long_documents.parts import natural_key, read_records
from msa_train.data.long_documents.topics import chain
from msa_train.data.long_documents.write import SUMMARY_NAME
from msa_train.data.origin import MADE_BY

PYTHON = {
    "setup.py": "import setuptools\n",
    "src/pkg/__init__.py": "from pkg.core import run\n",
    "src/pkg/core.py": "from . import helpers\nfrom .sub import deep as d\nimport os, pkg.late\n",
    "src/pkg/helpers.py": "VALUE = 1\n",
    "src/pkg/late.py": "def f():\n    from pkg.core import run\n",
    "src/pkg/sub/__init__.py": "",
    "src/pkg/sub/deep.py": "from ..helpers import VALUE\n",
    "old/pkg/helpers.py": "VALUE = 0\n",
    "src/pkg/broken.py": "from pkg.sub import deep\nprint 'no Python 3'\n",
}


def test_python_files_come_behind_what_they_import() -> None:
    repository = Repository(PYTHON)
    assert repository.imports_of("src/pkg/core.py") == [
        "src/pkg/helpers.py",
        "src/pkg/sub/deep.py",
        "src/pkg/late.py",
    ]
    assert repository.imports_of("src/pkg/broken.py") == ["src/pkg/sub/__init__.py"], "by pattern"
    order, cut = dependency_order(repository)
    assert sorted(order) == sorted(PYTHON)
    assert cut == 1, "late and core import each other"
    place = {path: number for number, path in enumerate(order)}
    assert place["src/pkg/helpers.py"] < place["src/pkg/sub/deep.py"] < place["src/pkg/core.py"]
    assert place["src/pkg/core.py"] < place["src/pkg/__init__.py"]


@pytest.mark.parametrize(
    ("texts", "path", "imports"),
    [
        (
            {
                "a.ts": "import {x} from './lib/b.js'\nconst c = require(\"./c\")\nimport 'r'",
                "lib/b.ts": "",
                "c/index.js": "",
            },
            "a.ts",
            ["lib/b.ts", "c/index.js"],
        ),
        (
            {
                "src/a.c": '#include <stdio.h>\n#include "a.h"\n# include "util/u.h"',
                "src/a.h": "",
                "include/util/u.h": "",
                "x/a.h": "",
            },
            "src/a.c",
            ["src/a.h", "include/util/u.h"],
        ),
        (
            {
                "app/src/org/x/A.java": "import org.x.util.B;\nimport static org.x.C.f;\nimport java.List;",
                "lib/org/x/util/B.java": "",
                "app/src/org/x/C.kt": "",
            },
            "app/src/org/x/A.java",
            ["lib/org/x/util/B.java", "app/src/org/x/C.kt"],
        ),
        (
            {
                "go.mod": "module example.org/m\n",
                "main.go": 'import (\n\t"fmt"\n\tp "example.org/m/pkg"\n)\n',
                "pkg/a.go": "",
                "pkg/a_test.go": "",
                "pkg/b.go": "",
            },
            "main.go",
            ["pkg/a.go", "pkg/b.go"],
        ),
        (
            {
                "src/lib.rs": "mod one;\npub mod two;\nuse crate::two::deep::Thing;",
                "src/one.rs": "",
                "src/two/mod.rs": "",
                "src/two/deep.rs": "",
            },
            "src/lib.rs",
            ["src/one.rs", "src/two/mod.rs", "src/two/deep.rs"],
        ),
        ({"a/b.rb": "require_relative '../c'\nrequire 'json'", "c.rb": ""}, "a/b.rb", ["c.rb"]),
        ({"notes.md": "import nothing", "nothing.py": ""}, "notes.md", []),
    ],
)
def test_imports_of_other_languages(texts: dict[str, str], path: str, imports: list[str]) -> None:
    assert Repository(texts).imports_of(path) == imports


def test_long_chains_of_imports_and_circles_end() -> None:
    count = 3000
    texts = {f"m{i:04d}.py": f"import m{(i + 1) % count:04d}\n" for i in range(count)}
    order, cut = dependency_order(Repository(texts))
    assert order == [f"m{i:04d}.py" for i in reversed(range(count))]
    assert cut == 1


def test_numbers_in_names_are_numbers() -> None:
    names = ["Chapter 10", "chapter 2", "appendix", "chapter 2b", "1 preface"]
    assert sorted(names, key=natural_key) == [
        "1 preface",
        "appendix",
        "chapter 2",
        "chapter 2b",
        "Chapter 10",
    ]


def test_neighbours_have_like_topics() -> None:
    ships = [
        "the frigate left harbour under sail",
        "sail and frigate, anchor and harbour",
        "anchor the frigate",
    ]
    bread = ["knead the dough with yeast", "yeast makes dough rise in the oven", "oven hot, dough baked"]
    order = chain([ships[0], bread[0], ships[1], bread[1], bread[2], ships[2]])
    assert sorted(order) == list(range(6))
    kinds = ["ship" if place in (0, 2, 5) else "bread" for place in order]
    assert kinds == ["ship"] * 3 + ["bread"] * 3
    assert chain([]) == []


def _write(root: Path, texts: dict[str, str]) -> Path:
    for name, text in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def _records(folder: Path) -> list[dict[str, object]]:
    return [record for file in sorted(folder.glob("*.zst")) for _, record in read_records(file, "text")]


def test_a_repository_becomes_a_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = _write(tmp_path / "repo", PYTHON)
    (root / "image.png").write_bytes(b"\x89PNG\0\0")
    (root / "latin.txt").write_bytes(b"caf\xe9")
    (root / "table.csv").write_text("1,2\n" * 300_000)
    output = tmp_path / "long"
    assert main(["prepare", str(root), "--join", "imports", "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert "1 documents of 8 texts" in out, "the empty __init__ is left out"
    assert "left out: 1 larger than 1,048,576 bytes" in out
    assert "left out: 1 not UTF-8" in out
    assert "left out: 1 not text" in out
    (record,) = _records(output)
    made = record["provenance"]
    assert isinstance(made, dict)
    assert (made["made_by"], made["name"], made["imports_cut"]) == ("repository_imports", "repo", 1)
    text = str(record["text"])
    assert [line[8:] for line in text.splitlines() if line.startswith("# file: ")] == made["parts"]
    assert json.loads((output / SUMMARY_NAME).read_text())["prepared"]["made_by"] == {"repository_imports": 1}
    # the same bytes on every machine, and nothing is written over
    again = tmp_path / "again"
    assert main(["prepare", str(root), "--join", "imports", "--output", str(again)]) == 0
    assert (again / "part-00000.jsonl.zst").read_bytes() == (output / "part-00000.jsonl.zst").read_bytes()
    assert main(["prepare", str(root), "--join", "imports", "--output", str(again)]) == 2
    assert "exists already; remove it, or name another folder" in capsys.readouterr().err


def test_chapters_of_records_and_of_folders(tmp_path: Path) -> None:
    rows = [("a", 2, "two"), ("a", 10, "ten"), ("a", 1, "one"), ("b", 1, "alone")]
    path = tmp_path / "books.jsonl"
    path.write_text("\n".join(json.dumps({"id": b, "chapter": c, "body": t}) for b, c, t in rows))
    fields = ["--text-field", "body", "--group-field", "id", "--name-field", "chapter"]
    output = tmp_path / "long"
    assert main(["prepare", str(path), "--join", "chapters", "--output", str(output), *fields]) == 0
    records = _records(output)
    assert [record["text"] for record in records] == ["one\n\ntwo\n\nten\n\n", "alone\n\n"]
    made = [record["provenance"]["made_by"] for record in records]  # type: ignore[index]
    assert made == ["chapters", "as_is"], "a single text was not made long"
    root = _write(
        tmp_path / "shelf", {"x/ch10.txt": "b", "x/ch9.txt": "a", "y/z/1.txt": "c", "y/z/2.txt": "d"}
    )
    assert main(["prepare", str(root), "--join", "chapters", "--output", str(tmp_path / "two")]) == 0
    assert [record["text"] for record in _records(tmp_path / "two")] == ["a\n\nb\n\n", "c\n\nd\n\n"]


def test_documents_are_cut_between_texts(tmp_path: Path) -> None:
    root = _write(tmp_path / "repo", {f"{i}.txt": "x" * 1000 for i in range(10)})
    output = tmp_path / "long"
    arguments = ["prepare", str(root), "--join", "paths", "--output", str(output), "--max-bytes", "4K"]
    assert main(arguments) == 0
    made = [record["provenance"] for record in _records(output)]
    assert [(m["name"], len(m["parts"])) for m in made] == [("repo#1", 4), ("repo#2", 4), ("repo#3", 2)]  # type: ignore[index]


def test_the_cache_and_the_packs_know_how_documents_were_made(tmp_path: Path) -> None:
    root = _write(tmp_path / "repo", {f"{i}.txt": f"file {i} " * 40 for i in range(9)})
    output = tmp_path / "long"
    arguments = ["prepare", str(root), "--join", "paths", "--output", str(output), "--max-bytes", "1K"]
    assert main(arguments) == 0
    (output / "other.jsonl").write_text('{"text": "plain words", "provenance": "the web"}\n')
    data = DataConfig(
        corpus=str(output), cache_dir=str(tmp_path / "cache"), seq_len=512, validation_fraction=0
    )
    corpus = prepare_corpus(data, vocab_size=300)
    codes = (Path(corpus.prefix).parent / "provenance.dat").read_bytes()
    assert sorted({MADE_BY[code] for code in codes}) == ["as_is", "repository_paths"]
    assert len(codes) == corpus.num_documents
    packs, _, _ = load_datasets(data, block_size=128, vocab_size=300, prepared=corpus)
    tokens = dict.fromkeys(MADE_BY, 0)
    for index in range(packs.num_packs):
        pack = packs[index]
        assert pack.origin is not None
        for code, length in zip(pack.origin.made_by.tolist(), pack.doc_lengths.tolist(), strict=True):
            tokens[MADE_BY[code]] += length
    assert tokens["as_is"] == len("plain words") + 1
    assert sum(tokens.values()) == corpus.num_tokens
    # whoever damages it is found out
    (Path(corpus.prefix).parent / "provenance.dat").write_bytes(b"\0" * len(codes))
    with pytest.raises(ValueError, match=r"is damaged \(provenance\.dat: checksum\)"):
        prepare_corpus(data, vocab_size=300)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing",), "nothing: does not exist; give a folder, or a file of JSONL"),
        (
            ("a.jsonl", "--group-field", "repo"),
            "a.jsonl:1: has no field repo; name one of its fields: text, n",
        ),
        (("a.jsonl", "--text-field", "n"), "a.jsonl:1: has no string in field n; correct the line"),
        (
            ("a.jsonl", "--group-field", "n"),
            "a.jsonl: group 1 comes a second time; sort the records by it, or give each folder once",
        ),
        (("a.jsonl", "--max-bytes", "1024M"), "--max-bytes=1073741824: must be from 1 to 33554432"),
        (("a.jsonl", "--window", "1"), "--window=1: must be at least 2, as neighbours are looked for in it"),
    ],
)
def test_mistakes_of_prepare(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("".join(f'{{"text": "t{i}", "n": {i % 2 + 1}}}\n' for i in range(3)))
    assert main(["prepare", "--join", "chapters", "--output", "out", *arguments]) == 2
    assert capsys.readouterr().err == f"msa-data: error: {message}\n"
    assert not Path("out").exists()
