"""Ask a question about numbered documents: a user's SQuAD or HotpotQA, or passages that are built.

Structure of RULER's qa: the gold documents, then others of the same article or question, then any, mixed and
numbered; the instruction stands before and after. Results of built passages are named qa_built, never qa.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from msa_train.evaluation.tasks.sample import Draft, Draw, TooShortError
from msa_train.evaluation.text.listed import listed
from msa_train.evaluation.text.question_files import Question, documents_of


@dataclass(frozen=True, slots=True)
class FileQuestionTask:
    """Ask the questions of a user's file; sample i has question i."""

    def __call__(self, draw: Draw) -> Draft:
        """Write a draft; the answer is the first one of the file."""
        questions = draw.material.questions
        question = questions[draw.index % len(questions)]
        own = {*question.gold, *question.near}
        others = [text for text in _all_documents(questions) if text not in own]
        draw.rng.shuffle(others)
        near = [text for text in question.near if text not in question.gold]
        draw.rng.shuffle(near)
        filler = iter([*near, *others])
        return _draft(draw, question.text, question.answer, list(question.gold), filler)


@lru_cache(maxsize=1)
def _all_documents(questions: tuple[Question, ...]) -> tuple[str, ...]:
    return tuple(documents_of(questions))


@dataclass(frozen=True, slots=True)
class BuiltQuestionTask:
    """Ask about one of many towns, each with a document of six facts; half of the questions need two."""

    def __call__(self, draw: Draw) -> Draft:
        """Write a draft; towns, founders and years are distinct, so there is one answer."""
        rng = draw.rng
        names = _town_names(rng)
        towns = (_town(rng, name, names) for name in names)
        town = next(towns)
        if rng.random() < 0.5:
            query, answer = f"In which year was {town.name} founded?", town.year
        else:
            query, answer = f"What is made in the town that {town.founder} founded?", town.trade
        return _draft(draw, query, answer, [town.text], (one.text for one in towns))


@dataclass(frozen=True, slots=True)
class _Town:
    name: str
    founder: str
    year: str
    trade: str
    text: str


_A = listed(
    "Ar Bel Cor Dal El Far Gol Hal Ist Jor Kel Lor Mar Nor Ol Per Quil Ros Sel Tar Ul Ver Wes Yar Zol"
)
_B = listed("a ba de fi go ha ka la mi no ra sa ti vo")
_C = listed("dale dorf ford gard ham holm mere mont mouth ness port stad ton vale ville wick")
_FIRST = listed(
    "Ada Bert Clara Dirk Edda Fritz Greta Hugo Ines Jan Kira Lars Mona Nils Olga Piet Rita Sven Tilda Udo"
)
_TRADES = listed(
    "bells bricks candles carpets clocks combs drums glass gloves hats lamps locks nails needles "
    "paper pianos pipes ropes saddles salt scales soap spoons tiles toys wheels"
)
_RIVERS = listed("Aske Brenn Calder Dunne Esk Fenn Garr Hollin Issel Jade")


def _town_names(rng: random.Random) -> Iterator[str]:
    """Yield the 5,376 names in an order of the sample's own."""
    numbers = list(range(len(_A) * len(_B) * len(_C)))
    rng.shuffle(numbers)
    for number in numbers:
        rest, c = divmod(number, len(_C))
        a, b = divmod(rest, len(_B))
        yield _A[a] + _B[b] + _C[c]


def _town(rng: random.Random, name: str, names: Iterator[str]) -> _Town:
    """Write a town; its founder's second name is a name that no town has."""
    founder, trade = f"{rng.choice(_FIRST)} {next(names, name)}", rng.choice(_TRADES)
    year, river, people = str(rng.randint(1100, 1899)), rng.choice(_RIVERS), rng.randint(12, 980) * 100
    text = (
        f"{name} is a town on the river {river}. It was founded in {year} by {founder}. About {people:,} "
        f"people live there. The town is known for its {trade}, which have been made there since "
        f"{int(year) + rng.randint(5, 90)}."
    )
    return _Town(name, founder, year, trade, text)


def _draft(draw: Draw, query: str, answer: str, gold: Sequence[str], filler: Iterator[str]) -> Draft:
    """Mix gold documents with as many others as fit, and number them."""
    before, after, prefix = draw.material.wording.qa.parts(query=query)
    # numbers take as many tokens as the largest one
    shown = [_numbered(9999, text) for text in gold]
    left = draw.left([before, *shown, after], prefix, [answer])
    others = _take(draw, filler, left)
    documents = [(text, True) for text in gold] + [(text, False) for text in others]
    draw.rng.shuffle(documents)
    texts = [_numbered(number + 1, text) for number, (text, _) in enumerate(documents)]
    texts[-1] = texts[-1].rstrip("\n")
    found = [(number + 1, 0) for number, (_, is_gold) in enumerate(documents) if is_gold]
    single = len(gold) == 1 and len(documents) > 1
    depth = (found[0][0] - 1) / (len(documents) - 1) if single else None
    return Draft([before, *texts, after], prefix, [answer], found, depth=depth)


def _take(draw: Draw, filler: Iterator[str], left: int) -> list[str]:
    """Take documents while they fit; the end of a short supply is no fault."""
    taken: list[str] = []

    def unit(number: int) -> str:
        while len(taken) <= number:
            text = next(filler, None)
            if text is None:
                raise _NoMoreError
            taken.append(text)
        return _numbered(9999, taken[number])

    return taken[: _fill(draw, unit, left)]


class _NoMoreError(Exception):
    """End the supply of documents."""


def _fill(draw: Draw, unit: Callable[[int], str], left: int) -> int:
    """Count the units that fit."""
    number = 0
    while True:
        try:
            cost = draw.counts.total([unit(number)])
        except _NoMoreError:
            return number
        if cost > left:
            if not number:
                raise TooShortError("has no room for a second document")
            return number
        left -= cost
        number += 1


def _numbered(number: int, text: str) -> str:
    return f"Document {number}:\n{text}\n\n"
