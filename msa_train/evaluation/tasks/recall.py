"""Write documents that teach to look back: many facts in running text, told again and asked for all along.

A task of the evaluation has one question at its end, so a handful of the tokens of a document teach
retrieval; small models learn nothing from that. Here facts take between a fifth and all of a document, and
each comes again up to `_MOST` times, anywhere behind its first place: distances reach from a line to the
whole document. Where a fact is told again its value stands there twice. The values of a document are all
numbers, all words or all uuids. The wording is that of the needle tasks.

Kinds matter where a token is a byte. Letters have to be told apart to read words, so looking back copies
letters soon; digits never matter but in values, and a model that has learned that they are even odds guesses
them on while it copies keys without an error. Uuids are both. Measured with a model of 0.8M parameters, one
seed, documents of 256 to 1,024 bytes: with all kinds needles (numbers) are found from 1.2M tokens on, with
numbers alone not after 2.8M.
"""

from dataclasses import dataclass

from msa_train.evaluation.tasks.needles import Kind, draw_distinct
from msa_train.evaluation.tasks.sample import Draft, Draw

_SHARES = (0.2, 1.0)
"of the tokens that are facts, drawn evenly"
_MOST = 16
"times that a fact comes again; drawn evenly for each document, one at least"
_ASKED = 0.5
"of these are questions with their answers, the others tell the fact once more"
_SPARE = 40
"tokens for the key in the last question, which comes twice"
_NOISE_SHARE = 0.25
"of the documents whose other lines are one line again and again, the others are running text"


@dataclass(slots=True)
class Fact:
    """Hold a needle and what is said about it."""

    needle: str
    "its line"
    question: tuple[str, str, str]
    "what is asked, how the answer begins, and the answer"
    again: list[str]
    "lines that come behind it"


@dataclass(frozen=True, slots=True)
class RecallTask:
    """Write one document."""

    def __call__(self, draw: Draw) -> Draft:
        """Write a draft; its last question is the sample's, the others stand in the prompt with answers."""
        rng, wording = draw.rng, draw.material.wording
        noise = rng.random() < _NOISE_SHARE
        kind = rng.choice(tuple(Kind))
        before, _, _ = wording.niah_parts(kind.value, "", single=True)
        facts = self._facts(draw, kind, before)
        asked, prefix, answer = rng.choice(facts).question
        lines = [line for fact in facts for line in (fact.needle, *fact.again)]
        left = draw.left([before, *lines, asked], prefix, [answer.strip()])
        read = draw.material.sentences.start(rng)

        def unit(number: int) -> str:
            return f"{wording.noise if noise else read(number)}\n"

        units = draw.fill(unit, left, least=0)
        placed = [(number + 0.5, text) for number, text in enumerate(units)]
        for fact in facts:
            at = rng.uniform(0, len(units))
            placed.append((at, fact.needle))
            placed += [(rng.uniform(at, len(units) + 1.0), line) for line in fact.again]
        placed.sort(key=lambda one: one[0])
        return Draft([before, *(text for _, text in placed), asked], prefix, [answer.strip()])

    def _facts(self, draw: Draw, kind: Kind, before: str) -> list[Fact]:
        """Draw as many facts as fit, one at least."""
        rng, words = draw.rng, draw.material.words
        # what the beginning and the last question leave
        first = self._fact(draw, kind, "", 0)
        room = draw.length - draw.counts.total([before, *first.question]) - _SPARE
        room *= rng.uniform(*_SHARES)
        most = rng.randint(1, _MOST)
        # a fact takes more than ten tokens; half of all keys are soon drawn
        count = min(max(int(room) // 10, 1), len(words.adjectives) * len(words.nouns) // 2)
        facts: list[Fact] = []
        for key in draw_distinct(rng, Kind.words, count, draw.material):
            fact = self._fact(draw, kind, key, rng.randint(1, most))
            while fact.again and draw.counts.total([fact.needle, *fact.again]) > room:
                fact.again.pop()
            if facts and not fact.again:
                return facts
            facts.append(fact)
            room -= draw.counts.total([fact.needle, *fact.again])
        return facts

    def _fact(self, draw: Draw, kind: Kind, key: str, times: int) -> Fact:
        rng, wording = draw.rng, draw.material.wording
        (value,) = draw_distinct(rng, kind, 1, draw.material)
        needle = wording.needle_text(kind.value, key, value) + "\n"
        _, after, prefix = wording.niah_parts(kind.value, key, single=True)
        question = (after.lstrip("\n"), prefix, f" {value}")
        told = f"{needle.strip()} Yes, {value}.\n"
        again = ["".join(question) + "\n" if rng.random() < _ASKED else told for _ in range(times)]
        return Fact(needle, question, again)
