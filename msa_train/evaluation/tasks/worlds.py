"""Tell of people who move, carry and give things among other sentences, and ask where something is.

Worlds of the kind of bAbI's first five tasks, in running text as BABILong has them: 1 the place of a person,
2 of a thing (who carries it where), 3 where it was before, 4 what lies beside what, 5 who gave what to whom.
The sentences of the world stand in order at random places; the answer is one word.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from msa_train.evaluation.tasks.sample import Draft, Draw, TooShortError
from msa_train.evaluation.text.listed import listed

_PEOPLE = listed("Mary John Daniel Sandra Peter Julie")
_PLACES = listed("kitchen garden office bedroom bathroom hallway")
_THINGS = listed("apple milk football book")
_MOVES = ("went to", "moved to", "walked to", "travelled to")
_DIRECTIONS = (("north", "south"), ("east", "west"))


@dataclass(slots=True)
class Story:
    """Hold a small world."""

    facts: list[str]
    "sentences in order"
    question: str
    "about it"
    answer: str
    "one word"
    support: list[int] = field(default_factory=list[int])
    "facts that the answer follows from"


def place_of_person(rng: random.Random) -> Story:
    """Move people; ask where one is. "John went to the garden." -> "Where is John?" garden."""
    facts, at, support = [], {}, {}
    for number in range(rng.randint(4, 8)):
        person, place = rng.choice(_PEOPLE), rng.choice(_PLACES)
        facts.append(_move(rng, person, place))
        at[person], support[person] = place, number
    person = rng.choice(sorted(at))
    return Story(facts, f"Where is {person}?", at[person], [support[person]])


def place_of_thing(rng: random.Random) -> Story:
    """Let one take a thing and walk; ask where the thing is."""
    return _carried(rng, ask_before=False)


def place_before(rng: random.Random) -> Story:
    """Let one walk with a thing; ask where it was before the last place."""
    return _carried(rng, ask_before=True)


def _carried(rng: random.Random, *, ask_before: bool) -> Story:
    thing, (carrier, other) = rng.choice(_THINGS), rng.sample(_PEOPLE, 2)
    places = rng.sample(_PLACES, 3)
    facts = [
        _move(rng, carrier, places[0]),
        f"{carrier} took the {thing}.",
        _move(rng, other, rng.choice(_PLACES)),
        _move(rng, carrier, places[1]),
        _move(rng, other, rng.choice(_PLACES)),
        _move(rng, carrier, places[2]),
        f"{carrier} put the {thing} down.",
        _move(rng, carrier, rng.choice([place for place in _PLACES if place != places[2]])),
    ]
    if ask_before:
        return Story(facts, f"Where was the {thing} before the {places[2]}?", places[1], [1, 3, 5])
    return Story(facts, f"Where is the {thing}?", places[2], [1, 5, 6])


def beside(rng: random.Random) -> Story:
    """Lay out rooms; ask what lies in a direction. "The office is north of the hallway." -> office."""
    a, b, c = rng.sample(_PLACES, 3)
    one, back = rng.choice(_DIRECTIONS)
    facts = [f"The {a} is {one} of the {b}.", f"The {b} is {one} of the {c}."]
    if rng.random() < 0.5:
        return Story(facts, f"What is {one} of the {b}?", a, [0])
    return Story(facts, f"What is {back} of the {b}?", c, [1])


def who_gave(rng: random.Random) -> Story:
    """Let people give things; ask for giver, receiver or thing."""
    giver, receiver, other = rng.sample(_PEOPLE, 3)
    thing, second = rng.sample(_THINGS, 2)
    facts = [
        _move(rng, giver, rng.choice(_PLACES)),
        f"{giver} took the {thing}.",
        f"{giver} gave the {thing} to {receiver}.",
        f"{other} gave the {second} to {giver}.",
    ]
    question, answer = rng.choice(
        [
            (f"Who gave the {thing} to {receiver}?", giver),
            (f"Who received the {thing}?", receiver),
            (f"What did {giver} give to {receiver}?", thing),
        ]
    )
    return Story(facts, question, answer, [2])


def _move(rng: random.Random, person: str, place: str) -> str:
    return f"{person} {rng.choice(_MOVES)} the {place}."


@dataclass(frozen=True, slots=True)
class WorldTask:
    """Spread a story over running text."""

    write: Callable[[random.Random], Story]
    "the story"

    def __call__(self, draw: Draw) -> Draft:
        """Write a draft."""
        story = self.write(draw.rng)
        before, after, prefix = draw.material.wording.qa.parts(query=story.question)
        facts = [f" {fact}" for fact in story.facts]
        left = draw.left([before, *facts, after], prefix, [story.answer])
        read = draw.material.sentences.start(draw.rng)
        units = draw.fill(lambda number: f" {read(number)}", left)
        if len(units) + 1 < len(facts):
            raise TooShortError(f"needs room for {len(facts)} sentences; ask for a longer context")
        places = sorted(draw.rng.sample(range(len(units) + 1), len(facts)))
        pieces, found = [before], []
        for number, unit in enumerate([*units, ""]):
            if number in places:
                fact = places.index(number)
                if fact in story.support:
                    found.append((len(pieces), 0))
                pieces.append(facts[fact])
            pieces.append(unit)
        return Draft([*pieces, after], prefix, [story.answer], found)


WORLD_TASKS = {
    "babi_qa1": WorldTask(place_of_person),
    "babi_qa2": WorldTask(place_of_thing),
    "babi_qa3": WorldTask(place_before),
    "babi_qa4": WorldTask(beside),
    "babi_qa5": WorldTask(who_gave),
}
