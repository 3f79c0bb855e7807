"""Documents that teach to look back: many needles and questions, and never a sample of the evaluation."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from launchers.data import main
from msa_train.config import DataConfig, EvaluationConfig
from msa_train.data import prepare_corpus
from msa_train.data.origin import MADE_BY
from msa_train.data.tokenizers.tokenizer import ByteTokenizer
from msa_train.evaluation.inputs import load_material, make_sample
from msa_train.evaluation.tasks.sample import TokenCounts
from msa_train.evaluation.training_documents import DocumentRequest, write_documents

REQUEST = DocumentRequest(tasks=("recall",), lengths=(400, 6000), documents=24)
# a word may have a blank or an apostrophe
NEEDLE = re.compile(r"^The (number|word|uuid) of ([^.:]+): ([^.]+)\.$", re.MULTILINE)
ANSWER = re.compile(r"Repeat the (number|word|uuid) of ([^.]+)\. The \1 of \2: ([^.\n]+)")


def test_a_document_asks_for_needles_behind_them() -> None:
    distances: list[int] = []
    kinds: set[str] = set()
    for number, document in enumerate(write_documents(REQUEST)):
        length = REQUEST.lengths[number % 2]
        assert length * 0.7 < len(document.text) <= length
        needles = {match[2]: match for match in NEEDLE.finditer(document.text)}
        answers = {match[2]: match for match in ANSWER.finditer(document.text)}
        assert answers.keys() <= needles.keys()
        assert len({match[1] for match in needles.values()}) == 1, "values of one kind"
        kinds |= {match[1] for match in needles.values()}
        for key in answers:
            needle = needles[key]
            assert needle[3] == answers[key][3], "the right answer"
            assert needle.start() < answers[key].start(), "is found by looking back"
            if length == 6000:
                distances.append(answers[key].start() - needle.end())
        last = max(answers.values(), key=lambda match: match.end())
        assert last.end() == len(document.text), "a document ends with an answer"
    assert min(distances) < 200
    assert max(distances) > 4000
    assert kinds == {"number", "word", "uuid"}


def test_documents_are_the_same_for_any_number_of_processes() -> None:
    request = replace(REQUEST, documents=9, tasks=("recall", "vt"), lengths=(1500, 4000))
    alone = [(one.name, one.text) for one in write_documents(request)]
    together = [(one.name, one.text) for one in write_documents(replace(request, processes=2))]
    assert together == alone
    assert len({text for _, text in alone}) == 9
    assert {name.split("#")[0] for name, _ in alone} == {"recall", "vt"}
    others = {one.text for one in write_documents(replace(request, seed=1))}
    assert not others & {text for _, text in alone}, "of another seed"


def test_no_sample_of_an_evaluation_is_among_them() -> None:
    """Seeds, numbers and lengths may be the same ones."""
    request = replace(REQUEST, tasks=("niah_single_2",), lengths=(1000,), documents=20, seed=5)
    settings = EvaluationConfig(tasks="niah_single_2", seed=5, depths=5)
    material, _ = load_material(settings)
    counts = TokenCounts(ByteTokenizer())
    samples = {
        make_sample(settings, material, counts, "niah_single_2", 1000, i).references for i in range(20)
    }
    values = {(re.findall(r"\d{7}", document.text)[-1],) for document in write_documents(request)}
    assert len(values) == 20
    assert not values & samples


def test_the_command_writes_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "recall"
    arguments = ["synthesize", "--lengths", "512,2K", "--documents", "6", "--output", str(output)]
    assert main(arguments) == 0
    assert "6 documents" in capsys.readouterr().out
    raw = zstandard.ZstdDecompressor().stream_reader((output / "part-00000.jsonl.zst").open("rb")).read()
    records = [json.loads(line) for line in raw.splitlines()]
    assert [record["provenance"]["length"] for record in records] == [512, 2048] * 3
    assert all(record["provenance"]["made_by"] in MADE_BY for record in records)
    data = DataConfig(corpus=str(output), cache_dir=str(tmp_path / "cache"))
    assert prepare_corpus(data, vocab_size=512).num_documents == 6
    summary = json.loads((output / ".prepared.json").read_text())
    assert summary["request"]["lengths"] == [512, 2048]
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_process_that_is_killed_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    # what each child imports first
    (tmp_path / "sitecustomize.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    output = tmp_path / "out"
    arguments = ["synthesize", "--lengths", "2K", "--documents", "4", "--processes", "2"]
    assert main([*arguments, "--output", str(output)]) == 2
    assert "--processes=2: one of them was killed, perhaps for its memory" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--tasks", "recal"], "--tasks=recal: there is no such task; use some of recall, niah_single_1"),
        (["--tasks", "qa"], "--tasks=qa: asks what a file of questions holds; use qa_built"),
        (["--lengths", "100"], "--lengths=100: is too short for recall"),
        (["--lengths", "4K,x"], "--lengths=x: must be a positive number of tokens"),
        (["--documents", "0"], "--documents=0: must be at least 1"),
        (["--processes", "0"], "--processes=0: must be at least 1"),
        (["--haystack", "/nowhere.txt"], "/nowhere.txt: cannot be read"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["synthesize", "--lengths", "4K", "--documents", "2", "--output", str(output), *given]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not output.exists()
