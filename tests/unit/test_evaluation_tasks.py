"""Samples of long-context tasks: their numbers, places and lengths; nothing is shared or left to chance."""

import re
from pathlib import Path

import numpy as np
import pytest

from msa_train.config.evaluation.settings import TASK_NAMES
from msa_train.data.tokenizers.json_tokenizer import JsonTokenizer
from msa_train.data.tokenizers.tokenizer import ByteTokenizer, Tokenizer
from msa_train.evaluation.tasks import words
from msa_train.evaluation.tasks.needles import NO_OVERLAP
from msa_train.evaluation.tasks.registry import TASKS, nominal_depth
from msa_train.evaluation.tasks.sample import Sample, TokenCounts, TooShortError, build_sample, reference_text
from msa_train.evaluation.text.haystacks import Sentences, load_sentences
from msa_train.evaluation.text.material import Material
from msa_train.evaluation.text.question_files import load_questions
from msa_train.evaluation.text.word_lists import WordLists
from msa_train.evaluation.text.wording import Wording

LISTS = WordLists(
    adjectives=("brave", "calm", "dry", "early", "fair"),
    nouns=tuple(f"noun{chr(97 + i)}" for i in range(20)),
    common=tuple(f"word{i}" for i in range(400)),
    more=tuple(f"longer{i}" for i in range(4000)),
    name="test",
    hint="",
)
SQUAD = """{"data": [{"title": "T", "paragraphs": [
  {"context": "Rome lies on the Tiber.", "qas": [
    {"question": "Where is Rome?", "answers": [{"text": "on the Tiber"}, {"text": "x"}]},
    {"question": "Why?", "answers": [], "is_impossible": true}]},
  {"context": "Paris lies on the Seine.", "qas": []},
  {"context": "London lies on the Thames, as all know.", "qas": []}]}]}"""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    path = tmp_path_factory.mktemp("questions") / "squad.json"
    path.write_text(SQUAD)
    return Material(LISTS, Sentences((), "built"), Wording(), load_questions(str(path)))


def make(
    task: str, material: Material, length: int = 4096, tokenizer: Tokenizer | None = None, **given: float
) -> Sample:
    counts = TokenCounts(tokenizer or ByteTokenizer())
    arguments = {"seed": 1, "index": 0, "depth": 0.5, **given}
    return build_sample(task, TASKS[task], length=length, counts=counts, material=material, **arguments)  # type: ignore[arg-type]


def text_of(sample: Sample, start: int, stop: int) -> str:
    return sample.tokens[start:stop].astype(np.uint8).tobytes().decode()


@pytest.mark.parametrize("task", TASKS)
def test_every_task_fits_and_knows_its_places(task: str, material: Material) -> None:
    sample = make(task, material)
    assert len(sample.tokens) <= 4096
    # the user's three documents are all there is of qa
    assert task == "qa" or len(sample.tokens) > 3600
    assert text_of(sample, 0, len(sample.tokens)) == sample.text
    assert text_of(sample, sample.answers[0][0], sample.answers[-1][1]) == reference_text(sample.references)
    assert bool(sample.needles) == (task not in ("cwe", "fwe"))
    for needle in sample.needles:
        assert needle.stop <= sample.answers[0][0]
        if task.startswith(("niah", "vt")):
            assert sample.references[needle.answer] in text_of(sample, needle.start, needle.stop)
    # tasks whose answers have no order are never counted as hits
    assert sample.ordered == (task not in ("cwe", "fwe", "vt", "niah_multivalue", "niah_multiquery"))


def test_names_are_those_of_the_configuration() -> None:
    assert tuple(TASKS) == TASK_NAMES


def test_same_arguments_give_the_same_sample(material: Material) -> None:
    for task in TASKS:
        one, other = make(task, material), make(task, material)
        assert one.text == other.text
        if task != "qa":
            assert make(task, material, index=1).text != one.text
            assert make(task, material, seed=2).text != one.text


def test_samples_share_no_order(material: Material) -> None:
    """RULER's shuffle is the same in every sample: rank 1 and needles always stand in the same places."""
    places = []
    for index in range(3):
        text = make("cwe", material, index=index).prompt.rpartition("Some words")[2]
        entries = re.findall(r"\d+\. (\w+)", text)
        counted = {word: entries.count(word) for word in entries}
        places.append([i for i, word in enumerate(entries) if counted[word] > 1][:12])
    assert places[0] != places[1] != places[2]


def test_depths() -> None:
    assert [nominal_depth(i, 3) for i in range(4)] == [0.0, 0.5, 1.0, 0.0]
    assert nominal_depth(7, 1) == 0.5


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_no_overlap"])
def test_single_needle_lies_at_its_depth(task: str, material: Material) -> None:
    starts = [make(task, material, depth=depth).needles[0].start for depth in (0.0, 0.5, 1.0)]
    context = make(task, material, depth=1.0)
    assert starts[0] < 160
    assert abs(starts[1] / starts[2] - 0.5) < 0.05
    assert starts[2] > len(context.tokens) - 250
    assert make(task, material, depth=1.0).depth == 1.0


def test_counts_of_common_words(material: Material) -> None:
    """10 words 30 times, others 3 times; 6 and 1 below 4,096 tokens; a worked example before."""
    for length, common, rare, example in ((8192, 30, 3, 190), (2048, 6, 1, 40)):
        sample = make("cwe", material, length)
        parts = sample.prompt.split("Some words of this numbered list")[1:]
        lists = [re.findall(r"\d+\. (\w+)", part) for part in parts]
        assert len(lists[0]) == example
        counted = {word: lists[1].count(word) for word in lists[1]}
        assert {counted[word] for word in sample.references} == {common}
        assert {counted[word] for word in counted if word not in sample.references} == {rare}
        # one more word would not fit
        assert length - len(sample.tokens) < rare * 20


def test_long_lists_are_all_of_the_longer_list(material: Material) -> None:
    sample = make("cwe", material, 40_000)
    assert all(word.startswith("longer") for word in sample.references)
    assert "word1" not in sample.prompt.split("Some words of this numbered list")[2]


def test_counts_of_frequent_words(material: Material) -> None:
    assert words.rank_counts(100, 5) == [60, 15, 6, 3, 2]
    sample = make("fwe", material, 8192)
    entries = sample.prompt.split()
    counts = [entries.count(word) for word in ("...", *sample.references)]
    # how many words there are follows from the first count, to within its rounding
    num_words = round((counts[0] + 0.5) * words.rank_counts(10**6, 1)[0] ** -1 * 10**6)
    expected = words.rank_counts(num_words, 4)
    assert all(abs(a - b) <= 1 for a, b in zip(counts, expected, strict=True))
    assert counts == sorted(counts, reverse=True)


def test_chain_of_variables(material: Material) -> None:
    sample = make("vt", material)
    value = re.findall(r"hold (\d{5}):", sample.prefix)
    lines = re.findall(r"let ([A-Z]{5}) = (\w+)\.", sample.prompt)
    assert lines[0][1] == value[0]
    assert [b for _, b in lines[1:]] == [a for a, _ in lines[:-1]]
    assert [a for a, _ in lines] == list(sample.references)
    assert len(lines) == 5


def test_questions_of_a_file(material: Material) -> None:
    sample = make("qa", material)
    assert sample.references == ("on the Tiber",)
    (needle,) = sample.needles
    assert "Rome lies" in text_of(sample, needle.start, needle.stop)
    assert sample.prompt.count("Document ") == 3


def test_no_overlap_shares_no_word() -> None:
    def content(text: str) -> set[str]:
        return {
            word for word in re.findall(r"[a-z]{4,}", text.lower()) if word not in {"name", "with", "that"}
        }

    assert len(NO_OVERLAP) == 20
    for needle, question in NO_OVERLAP:
        assert not content(needle) & content(question), needle


def test_too_short_is_said(material: Material) -> None:
    for task in TASKS:
        with pytest.raises(TooShortError, match=r"^(needs|has)"):
            make(task, material, 60)


class PairTokenizer(ByteTokenizer):
    """Joins two letters to a token wherever they stand: tokens of parts do not add up."""

    def encode(self, text: bytes) -> np.ndarray:
        ids = [text[i] + (text[i + 1] << 8 if i + 1 < len(text) else 0) for i in range(0, len(text), 2)]
        return np.array(ids, np.int32)

    def encode_batch(self, texts: object) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]  # type: ignore[attr-defined]


@pytest.mark.parametrize("task", ["niah_single_2", "vt", "cwe", "babi_qa3"])
def test_needles_are_found_where_tokens_do_not_add_up(task: str, material: Material) -> None:
    sample = make(task, material, 2048, PairTokenizer())
    assert len(sample.tokens) <= 2048
    text = sample.prompt
    for needle in sample.needles:
        shown = text[2 * needle.start : 2 * needle.stop]
        assert sample.task != "niah_single_2" or sample.references[0] in shown


def test_trained_tokenizer_finds_places_too(tmp_path: Path, material: Material) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator([make(task, material).text for task in TASKS], trainer)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = JsonTokenizer(str(tmp_path / "tokenizer.json"))
    for task in TASKS:
        sample = make(task, material, 3000, tokenizer)
        assert len(sample.tokens) <= 3000
        for needle in sample.needles:
            if task.startswith(("niah", "vt")):
                shown = library.decode(sample.tokens[needle.start : needle.stop].tolist())
                assert sample.references[needle.answer] in shown


def test_a_users_text_is_cut_into_sentences(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Dr. Smith went home.  He was\ntired. " * 10)
    sentences = load_sentences(str(path))
    assert "He was tired." in sentences.given
    assert sentences.name.startswith("sha256:")
    path.write_text("One only.")
    with pytest.raises(ValueError, match=r"evaluation.haystack=.*has 1 sentences"):
        load_sentences(str(path))
    with pytest.raises(ValueError, match=r"evaluation.haystack=.*cannot be read"):
        load_sentences(str(tmp_path / "none"))
