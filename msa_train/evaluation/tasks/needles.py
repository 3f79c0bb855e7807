"""Hide sentences in a haystack and ask for them: one, one of several keys, several values, several queries.

Structure of RULER's niah tasks: a needle is one sentence that gives a value (a number of 7 digits, a word or
a uuid) for a key; the haystack is noise (one line again and again), running text, or needles. In lines,
needles come before distinct random lines; in running text before the sentence at int(n * d), d from 40 even
depths. A single needle goes to the depth that it is asked at, which makes the picture of length and depth.
"""

import random
import uuid
from dataclasses import dataclass
from enum import Enum

from msa_train.evaluation.tasks.sample import Draft, Draw, TooShortError
from msa_train.evaluation.text.listed import listed
from msa_train.evaluation.text.material import Material

_DEPTHS = 40


class Haystack(Enum):
    """Say what needles are hidden in."""

    noise = "noise"
    essay = "essay"
    needle = "needle"


class Kind(Enum):
    """Say what keys and values are; the plural is what the frame calls values."""

    words = "words"
    numbers = "numbers"
    uuids = "uuids"


@dataclass(frozen=True, slots=True)
class NeedleTask:
    """Hold what tells the tasks apart."""

    haystack: Haystack
    "what they lie in"
    keys: Kind = Kind.words
    "of the needles"
    values: Kind = Kind.numbers
    "of the needles"
    num_keys: int = 1
    "keys, those that are not asked for included"
    num_values: int = 1
    "values of each key, each in a needle of its own"
    num_queries: int = 1
    "keys that are asked for"

    def __call__(self, draw: Draw) -> Draft:
        """Write a draft."""
        rng, wording = draw.rng, draw.material.wording
        keys = draw_distinct(rng, self.keys, max(self.num_keys, self.num_queries), draw.material)
        # keys before their values, one by one
        needles = [
            (key, value)
            for key in keys
            for value in draw_distinct(rng, self.values, self.num_values, draw.material)
        ]
        asked = rng.sample(keys, self.num_queries)
        values = {key: [value for other, value in needles if other == key] for key in asked}
        references = [value for key in asked for value in values[key]]
        single = self.num_queries * self.num_values == 1
        before, after, prefix = wording.niah_parts(self.values.value, _joined(asked), single=single)
        in_text = self.haystack is Haystack.essay
        texts = [wording.needle_text(self.values.value, *needle) for needle in needles]
        pieces = [f" {text}" if in_text else f"{text}\n" for text in texts]
        left = draw.left([before, *pieces, after], prefix, references)
        units = self._units(draw, left, set(keys))
        answer_of = {
            number: references.index(value)
            for number, (key, value) in enumerate(needles)
            if key in values and value in references
        }
        return self._arrange(draw, units, pieces, answer_of, (before, after, prefix), references)

    def _units(self, draw: Draw, left: int, taken: set[str]) -> list[str]:
        """Fill the haystack."""
        if self.haystack is Haystack.essay:
            read = draw.material.sentences.start(draw.rng)
            return draw.fill(lambda number: f" {read(number)}", left, least=2)
        if self.haystack is Haystack.noise:
            return draw.fill(lambda _number: f"{draw.material.wording.noise}\n", left, least=2)
        wording, seed = draw.material.wording, draw.rng.randrange(1 << 30)

        def needle(number: int) -> str:
            # the same one however often it is asked for
            rng = random.Random(f"{seed}/{number}")
            key = next(k for k in iter(lambda: _one(rng, self.keys, draw.material), "") if k not in taken)
            value = _one(rng, self.values, draw.material)
            return f"{wording.needle_text(self.values.value, key, value)}\n"

        return draw.fill(needle, left, least=2)

    def _arrange(
        self,
        draw: Draw,
        units: list[str],
        needles: list[str],
        answer_of: dict[int, int],
        frame: tuple[str, str, str],
        references: list[str],
    ) -> Draft:
        """Put the needles among the units."""
        before, after, prefix = frame
        places = self._places(draw, len(units), len(needles), min(answer_of, default=0))
        pieces, found = [before], []
        for number, unit in enumerate([*units, ""]):
            for needle, place in enumerate(places):
                if place == number:
                    if needle in answer_of:
                        found.append((len(pieces), answer_of[needle]))
                    pieces.append(needles[needle])
            pieces.append(unit)
        single = len(references) == 1
        depth = places[min(answer_of, default=0)] / max(len(units), 1) if single else None
        return Draft([*pieces, after], prefix, references, found, depth=depth, ordered=single)

    def _places(self, draw: Draw, num_units: int, num_needles: int, asked: int) -> list[int]:
        """Choose the unit that each needle comes before; `asked` goes to the depth of the sample, if single.

        Example: 10 units, depth 0.5 and no other needle -> [5].
        """
        rng, own = draw.rng, self.num_queries * self.num_values == 1
        others = num_needles - own
        if others > num_units:
            raise TooShortError("has no room for its needles")
        if self.haystack is Haystack.essay:
            depths = [i / (_DEPTHS - 1) for i in range(_DEPTHS)]
            free = [int(num_units * depth) for depth in rng.sample(depths, others)]
        else:
            free = rng.sample(range(num_units), others)
        rng.shuffle(free)
        if own:
            free.insert(asked, int(num_units * draw.depth))
        return free


def _joined(names: list[str]) -> str:
    """Join names with commas and a final "and": ["a", "b", "c"] -> "a, b, and c"."""
    if len(names) < 2:
        return names[0]
    return f"{', '.join(names[:-1])}, and {names[-1]}"


def draw_distinct(rng: random.Random, kind: Kind, count: int, material: Material) -> list[str]:
    """Draw keys or values, each once, in the order in which they were drawn."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[_one(rng, kind, material)] = None
    return list(found)


def _one(rng: random.Random, kind: Kind, material: Material) -> str:
    """Draw a key or a value: "brave-otter", "4821973", or a uuid of 128 random bits."""
    if kind is Kind.numbers:
        return str(rng.randint(1_000_000, 9_999_999))
    if kind is Kind.uuids:
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))
    return f"{rng.choice(material.words.adjectives)}-{rng.choice(material.words.nouns)}"


NEEDLE_TASKS = {
    "niah_single_1": NeedleTask(Haystack.noise),
    "niah_single_2": NeedleTask(Haystack.essay),
    "niah_single_3": NeedleTask(Haystack.essay, values=Kind.uuids),
    "niah_multikey_1": NeedleTask(Haystack.essay, num_keys=4),
    "niah_multikey_2": NeedleTask(Haystack.needle),
    "niah_multikey_3": NeedleTask(Haystack.needle, keys=Kind.uuids, values=Kind.uuids),
    "niah_multivalue": NeedleTask(Haystack.essay, num_values=4),
    "niah_multiquery": NeedleTask(Haystack.essay, num_queries=4),
}


@dataclass(frozen=True, slots=True)
class NoOverlapTask:
    """Hide a sentence that shares no word with the question: the link between them is knowledge."""

    def __call__(self, draw: Draw) -> Draft:
        """Write a draft; the answer is a name."""
        needle, question = draw.rng.choice(NO_OVERLAP)
        name = draw.rng.choice(_NAMES)
        before, after, prefix = draw.material.wording.qa.parts(query=question)
        # the essay is one document
        piece = " " + needle.format(name=name)
        left = draw.left([before, piece, after], prefix, [name])
        read = draw.material.sentences.start(draw.rng)
        units = draw.fill(lambda number: f" {read(number)}", left, least=2)
        place = int(len(units) * draw.depth)
        pieces = [before, *units[:place], piece, *units[place:], after]
        return Draft(pieces, prefix, [name], [(1 + place, 0)], depth=place / len(units))


_NAMES = listed(
    "Adela Amir Anton Astrid Bela Bruno Carla Cyril Dalia Egon Elena Farid Greta Hanno Ilse Ivo Jonas "
    "Katya Leila Marek Nadia Oskar Paula Quentin Rosa Selma Tomas Ursula Viktor Wanda Xenia Yusuf "
    "Zora"
)
# (needle, question): no word of three letters or more in both
NO_OVERLAP = (
    ("{name} lives within sight of the Eiffel Tower.", "Which person has a home in Paris?"),
    ("{name} cannot eat anything made of wheat flour.", "Who must avoid gluten?"),
    ("{name} rides past the Kremlin every morning.", "Which person works in Moscow?"),
    ("{name} has never tasted meat.", "Who is a vegetarian?"),
    ("From the window {name} looks at the Golden Gate.", "Who has a room in San Francisco?"),
    ("{name} spends each night at the telescope.", "Which person is an astronomer?"),
    ("{name} walks with a white cane and a trained dog.", "Who is blind?"),
    ("{name} pulls teeth for a living.", "Which person is a dentist?"),
    ("{name} grew up beside the pyramids of Giza.", "Who comes from Egypt?"),
    ("{name} sings the highest part at the opera.", "Which person is a soprano?"),
    ("{name} keeps forty hives behind the house.", "Who makes honey?"),
    ("{name} writes with the left hand only since the cast was put on.", "Whose right arm is broken?"),
    ("{name} took the first exam in law last June.", "Who wants to become an attorney?"),
    ("{name} wakes at three to light the ovens for the rolls.", "Which person is a baker?"),
    ("{name} turned one hundred in May.", "Who was born a century ago?"),
    ("{name} steers the ship out of the harbour.", "Which person is a captain?"),
    ("{name} was awarded the medal in Stockholm for chemistry.", "Who holds a Nobel prize?"),
    ("{name} sleeps under the Brandenburg Gate when on tour.", "Which person has been to Berlin?"),
    ("{name} falls ill after a sip of milk.", "Who does not tolerate lactose?"),
    ("{name} has two brothers born on the very same day as herself.", "Which person is a triplet?"),
)
