"""Wording and word lists: our own, a benchmark's that is never executed, and what is not installed."""

import builtins
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from msa_train.evaluation.text import word_lists
from msa_train.evaluation.text.question_files import load_questions
from msa_train.evaluation.text.ruler_definitions import load_wording
from msa_train.evaluation.text.wording import Frame, Wording, fill

# of the form of the benchmark's files, in words of our own
CONSTANTS = '''
TASKS = {
    "niah": {
        "tokens_to_generate": 128,
        "template": """Some secret {type_needle_v} are below.\\n{context}\\n"""
        """What are all the {type_needle_v} for {query}?""",
        "answer_prefix": """ The {type_needle_v} for {query} are""",
    },
    "variable_tracking": {"template": "T {context} Q {query}", "answer_prefix": " A {num_v} {query}: "},
    "common_words_extraction": {"template": "C {context}", "answer_prefix": " A:"},
    "freq_words_extraction": {"template": "F {context}", "answer_prefix": " A:"},
    "qa": {"template": "Q {context} {query}", "answer_prefix": " A:"},
}
'''
NEEDLES = """
import os
os.system("touch executed")
needle = "One {type_needle_v} for {key} is: {value}."
if args.type_haystack == "noise":
    haystack = "Grass is here."
"""


def clone(folder: Path, constants: str = CONSTANTS, needles: str = NEEDLES) -> str:
    place = folder / "scripts/data/synthetic"
    place.mkdir(parents=True, exist_ok=True)
    (place / "constants.py").write_text(constants)
    (place / "niah.py").write_text(needles)
    return str(folder)


def test_own_wording() -> None:
    wording = load_wording("")
    assert wording == Wording()
    assert wording.name == "ruler_like"
    assert wording.niah_parts("numbers", "k", single=True)[2] == " The number of k:"
    assert wording.needle_text("uuids", "k", "v") == "The uuid of k: v."


def test_benchmarks_wording_is_read_and_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wording = load_wording(clone(tmp_path))
    assert not (tmp_path / "executed").exists()
    assert wording.name == "ruler"
    assert len(wording.digest) == 16
    assert wording.noise == "Grass is here."
    # the singular is made as the benchmark makes it
    before, after, prefix = wording.niah_parts("numbers", "k", single=True)
    assert before == "A secret number is below.\n"
    assert after == "\nWhat is the number for k?"
    assert prefix == " The number for k is"
    assert wording.niah_parts("numbers", "a, and b", single=False)[0] == "Some secret numbers are below.\n"
    assert wording.needle_text("numbers", "k", "7") == "One numbers for k is: 7."


@pytest.mark.parametrize(
    ("constants", "needles", "reason"),
    [
        ("TASKS = dict(a=1)", NEEDLES, "is not written out"),
        ("TASKS = {**__import__('os').environ}", NEEDLES, "is not written out"),
        ("x = 1", NEEDLES, "has no TASKS"),
        ("TASKS = {", NEEDLES, "is no Python"),
        ("(" * 5000, NEEDLES, "is no Python"),
        ("TASKS = {}", NEEDLES, "no template and answer_prefix of niah"),
        (CONSTANTS.replace("C {context}", "C"), NEEDLES, "has no {context}"),
        (CONSTANTS.replace("C {context}", "C {context} {query.__class__} {other}"), NEEDLES, "{other}"),
        (CONSTANTS, "x = 1", "sets no needle"),
    ],
)
def test_bad_definitions_are_refused(tmp_path: Path, constants: str, needles: str, reason: str) -> None:
    with pytest.raises(ValueError) as error:
        load_wording(clone(tmp_path, constants, needles))
    text = str(error.value)
    assert text.startswith("evaluation.templates=")
    assert reason in text
    assert "\n" not in text


def test_missing_clone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluation.templates=.*constants.py; give a clone"):
        load_wording(str(tmp_path))


def test_fields_are_names_alone() -> None:
    assert fill("{a} {a.b} {a[0]} {}", {"a": "x"}) == "x {a.b} {a[0]} {}"
    with pytest.raises(ValueError, match=r"no \{context\}"):
        Frame("x", "y").parts()


def test_installed_lists() -> None:
    pytest.importorskip("english_words")
    if importlib.util.find_spec("wonderwords") is None:
        pytest.skip("wonderwords is not installed")
    lists = word_lists.load_word_lists()
    assert len(lists.common) == 8166
    assert len(lists.more) == 234_450
    assert not lists.hint


def test_words_are_built_where_nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **kwargs: Any) -> Any:
        if name == "english_words":
            raise ImportError(name)
        return real(name, *rest, **kwargs)

    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(builtins, "__import__", without)
    lists = word_lists.load_word_lists.__wrapped__()
    assert lists.name == "built"
    assert "wonderwords and english-words not installed" in lists.hint
    assert "\n" not in lists.hint
    for words in (lists.adjectives, lists.nouns, lists.common, lists.more):
        assert len(set(words)) == len(words)
        assert list(words) == sorted(words)
    assert len(lists.common) > 8000
    assert len(lists.more) == 1 << 18


@pytest.mark.parametrize("content", ["[]", "{}", '{"data": 3}', "[[1]]", "{", '[{"question": 1}]', "null"])
def test_bad_questions_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "q.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"^evaluation.questions=.*; give the JSON file"):
        load_questions(str(path))


def test_hotpot(tmp_path: Path) -> None:
    path = tmp_path / "h.json"
    path.write_text(
        '[{"question": "Q?", "answer": "yes", "supporting_facts": [["A", 0]],'
        ' "context": [["A", ["a1. ", "a2."]], ["B", ["b1."]]]}]'
    )
    (question,) = load_questions(str(path))
    assert question.gold == ("A\na1. a2.",)
    assert question.near == ("B\nb1.",)
    assert question.source.startswith("hotpot sha256:")
